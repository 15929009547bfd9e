"""Makes answer rows from replies, and decides which tasks of a segment earlier runs have already answered."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from af3pipe.models.engine import EngineInfo
from af3pipe.models.tasks import parse, thinking
from af3pipe.schemas import (
    ROUNDING_S,
    Answer,
    Covered,
    Reply,
    Segment,
    Task,
    TimedText,
    answer_key,
    stitched_key,
    task_key,
)
from af3pipe.transforms.outcome import now_us, public_uri


def make_answer(segment: Segment, task: Task, reply: Reply, info: EngineInfo) -> Answer:
    """Makes the row of one reply.

    Raises:
        Rejected: The reply is invalid for the task.
    """
    text, choice = parse(task, reply.text)
    recording = segment.recording
    return Answer(
        recording_id=recording.recording_id,
        uri=public_uri(recording),
        source_key=recording.source_key,
        size_bytes=recording.size_bytes,
        etag=recording.etag,
        mtime=recording.mtime,
        segment_index=segment.segment_index,
        start_s=segment.start_s,
        end_s=segment.end_s,
        duration_s=segment.info.duration_s,
        sample_rate=segment.info.sample_rate,
        channels=segment.info.channels,
        codec=segment.info.codec,
        **segment.levels._asdict(),
        channel=recording.channel,
        stream=recording.stream,
        task=task.name,
        prompt=task.prompt or "",
        history=tuple(turn.prompt for turn in task.history),
        question_id=task.question_id,
        question=task.question,
        choices=task.choices,
        text=text,
        choice=choice,
        segments=(TimedText(segment.start_s, segment.end_s, text),) if task.stitch else (),
        finish_reason=reply.finish_reason,
        audio_tokens=reply.audio_tokens,
        prompt_tokens=reply.prompt_tokens,
        new_tokens=reply.new_tokens,
        model_id=info.model_id,
        model_revision=info.model_revision,
        family=info.family,
        engine=info.engine,
        dtype=info.dtype,
        decoding=task.decoding.to_json(),
        answer_key=segment_key(segment, task, info.model_id, info.model_revision),
        metadata=recording.metadata,
        run_id="",
        created_at=now_us(),
    )


def segment_key(segment: Segment, task: Task, model_id: str, model_revision: str) -> str:
    """Returns the `answer_key` of a task for a segment."""
    cut_at = segment.cut_at if is_part(segment, task) else None
    return answer_key(
        segment.recording, segment.start_s, segment.end_s, task, model_id, model_revision, cut_at=cut_at
    )


def is_part(segment: Segment, task: Task) -> bool:
    """Returns whether the answer is one of several segments' answers that are merged into one."""
    return task.stitch and not (segment.segment_index == 0 and segment.is_last)


class Wanted(NamedTuple):
    """Lists what to request about a segment for one recording.

    Attributes:
        tasks: Tasks to request, in order, including answered ones whose reply a follow-up needs.
        kept: Tasks that an earlier run has answered, and what that answer covers.
    """

    tasks: tuple[Task, ...]
    kept: dict[Task, Covered]

    @property
    def new(self) -> tuple[Task, ...]:
        """The tasks whose replies become new rows."""
        return tuple(task for task in self.tasks if task not in self.kept)


def wanted_of(segment: Segment, tasks: Sequence[Task], model: tuple[str, str]) -> Wanted:
    """Splits tasks into those to request and those that earlier runs have answered for the segment's recording."""
    tasks = tuple(tasks)
    if not segment.recording.existing.answers:
        return Wanted(tasks, {})
    kept = {task: found for task in tasks if (found := _answered(segment, task, model)) is not None}
    # A follow-up needs the earlier replies, so they are requested again, but their answers are not written again.
    before = {task.history[: n + 1] for task in tasks if task not in kept for n in range(len(task.history))}
    return Wanted(tuple(task for task in tasks if task not in kept or thinking(task).turns in before), kept)


def _answered(segment: Segment, task: Task, model: tuple[str, str]) -> Covered | None:
    """Returns the existing answer with the same content, model, prompt and decoding; None if there is none."""
    existing = segment.recording.existing.answers
    if not is_part(segment, task):
        key = segment_key(segment, task, *model)
        return next((found for found in existing if found.answer_key == key), None)
    return next((found for found in _may_be_merged(segment, task, model) if _is_whole(segment, found)), None)


def _may_be_merged(segment: Segment, task: Task, model: tuple[str, str]) -> Iterator[Covered]:
    """Yields existing answers that were merged from parts like this one."""
    for found in segment.recording.existing.answers:
        if found.task == task_key(task.name, task.question_id):
            parts = [
                answer_key(segment.recording, *piece, task, *model, cut_at=segment.cut_at) for piece in found.pieces
            ]
            if stitched_key(parts) == found.answer_key:
                yield found


def _is_whole(segment: Segment, found: Covered) -> bool:
    """Returns whether a merged answer covers the requested span of the recording without a gap.

    The answer must reach the end exactly: if the last part failed, the known duration is only the header's estimate,
    which the parts before may exceed.
    """
    end_s = segment.recording.offset_s
    for start_s, piece_end_s in found.pieces:
        if start_s > end_s + ROUNDING_S:
            return False
        end_s = piece_end_s
    return abs(end_s - segment.recording.wanted_until_s(found.duration_s)) <= ROUNDING_S
