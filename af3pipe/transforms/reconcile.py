"""Every recording that was found, held against what became of it: one terminal state each."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import registry

from af3pipe.audio.levels import combine
from af3pipe.schemas import (
    ROUNDING_S,
    Answer,
    Covered,
    DeadLetter,
    Levels,
    Recording,
    RecordingResult,
    Task,
    TerminalState,
    task_key,
)
from af3pipe.transforms import metrics
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.outcome import now_us, public_uri, recording_of

_log = logging.getLogger(__name__)


class Failed(NamedTuple):
    """What reconciling needs of a dead letter.

    Attributes:
        input: As of `DeadLetter`: says which recording it is where nothing else does.
        run_id: Of the run that wrote it; empty for this one.
    """

    dead_letter_key: str
    reason: str
    input: str
    run_id: str = ""


registry.register_coder(Failed, RowTupleCoder)


def covered_by(answer: Answer) -> Covered:
    """What an answer says was covered; a stitched one lists its pieces, and may have gaps."""
    pieces = tuple((piece.start_s, piece.end_s) for piece in answer.segments)
    return Covered(
        answer.answer_key,
        task_key(answer.task, answer.question_id),
        pieces or ((answer.start_s, answer.end_s),),
        answer.duration_s,
        answer.levels,
        answer.content_identity,
    )


def settle(
    recording: Recording,
    covered: Iterable[Covered],
    failed: Iterable[Failed],
    asked: frozenset[str] = frozenset(),
    *,
    kept: Iterable[Covered] = (),
) -> RecordingResult | None:
    """The terminal state of a recording; None when something asked came to nothing, which must not happen.

    A task in `asked` has to have answers, or there has to be a dead letter that says why not.

    `ok` when it has answers, no dead letter, and each task covers all that was wanted; `ok_partial` when it has
    answers but one of these does not hold; `dead_letter` when it has only dead letters.

    Args:
        recording: Which.
        covered: By this run's answers.
        failed: Its dead letters; those that an earlier run wrote say so.
        asked: By `task_key`.
        kept: What earlier runs' answers cover, as far as they are to the work asked for now.
    """
    new = {found.answer_key: found for found in covered}
    covered = [*new.values(), *{found.answer_key: found for found in kept if found.answer_key not in new}.values()]
    failed = list({found.dead_letter_key: found for found in failed}.values())
    if not failed and not (covered and asked <= {found.task for found in covered}):
        return None
    # The last segment's: only there has decoding reached the end; before it, this is the header's estimate.
    duration_s = max(covered, key=lambda found: found.pieces[-1][1]).duration_s if covered else None
    covered_s = _covered_s(covered)
    if not covered:
        state = TerminalState.DEAD_LETTER
    elif failed or covered_s < recording.wanted_until_s(duration_s) - recording.offset_s - ROUNDING_S:
        state = TerminalState.OK_PARTIAL
    else:
        state = TerminalState.OK
    told_before = sum(1 for found in failed if found.run_id)
    return RecordingResult(
        **own_columns(recording),
        terminal_state=state,
        settled_state=state,
        duration_s=duration_s,
        covered_s=covered_s,
        answers=len(new),
        kept_answers=len(covered) - len(new),
        answer_keys=tuple(sorted(found.answer_key for found in covered)),
        dead_letters=len(failed) - told_before,
        kept_dead_letters=told_before,
        dead_letter_keys=tuple(sorted(found.dead_letter_key for found in failed)),
        reasons=tuple(sorted({found.reason for found in failed})),
        **_levels(covered),
    )


def own_columns(recording: Recording) -> dict[str, Any]:
    """The columns of a `RecordingResult` that say which recording it is, and that it is a new row."""
    return {
        "recording_id": recording.recording_id,
        "uri": public_uri(recording),
        "work_key": recording.work_key,
        "size_bytes": recording.size_bytes,
        "etag": recording.etag,
        "mtime": recording.mtime,
        "offset_s": recording.offset_s,
        "channel": recording.channel,
        "stream": recording.stream,
        "metadata": recording.metadata,
        "run_id": "",
        "created_at": now_us(),
    }


def settle_rejected(recording_id: str, failed: Iterable[Failed]) -> RecordingResult:
    """The terminal state of what was rejected, as often as it was named, before there was anything to ask."""
    failed = sorted(failed)  # whatever order they come in, the same of them says which recording it is
    result = settle(recording_of(failed[0].input), [], failed)
    assert result is not None  # it has a dead letter
    return result._replace(recording_id=recording_id)  # a dead letter's input masks what looks like a secret


def _covered_s(covered: Iterable[Covered]) -> float:
    """Seconds that every answered task covers: of the task that covers least."""
    by_task: dict[str, tuple[tuple[float, float], ...]] = defaultdict(tuple)
    for found in covered:
        by_task[found.task] += found.pieces
    return min((_length_s(pieces) for pieces in by_task.values()), default=0.0)


def _levels(covered: Iterable[Covered]) -> dict[str, Any]:
    """The columns of what was heard: by the task that heard most, since all measured the same samples."""
    by_task: dict[str, list[tuple[float, Levels]]] = defaultdict(list)
    for found in covered:
        by_task[found.task].append((_length_s(found.pieces), found.levels))
    # Sorted, so that tasks that heard as much give the same to the last digit, whatever order they come in.
    parts = max((by_task[task] for task in sorted(by_task)), key=_heard_s, default=[])
    return combine(parts)._asdict() if parts else dict.fromkeys(Levels._fields)


def _heard_s(parts: Iterable[tuple[float, Levels]]) -> float:
    return math.fsum(length_s for length_s, _ in parts)


def _length_s(pieces: Iterable[tuple[float, float]]) -> float:
    """Seconds under the pieces; what two of them cover counts once."""
    covered_s = reached_s = 0.0
    for start_s, end_s in sorted(pieces):
        covered_s += max(0.0, end_s - max(start_s, reached_s))
        reached_s = max(reached_s, end_s)
    return covered_s


class _SettleDoFn(beam.DoFn):
    def __init__(self, asked: frozenset[str]) -> None:
        self._asked = asked

    def process(self, group: tuple[str, dict[str, Iterable[Any]]]) -> Iterator[RecordingResult]:
        recording_id, found = group
        covered, failed = list(found["answers"]), list(found["dead_letters"])
        recordings = list(found["recordings"])
        result = None
        if len(recordings) == 1:
            result = self._settle(recordings[0], covered, failed, list(found.get("kept", ())))
        elif failed and not recordings:
            result = settle_rejected(recording_id, failed)
        if result is None:
            metrics.count("unaccounted")
            uri = recordings[0].uri if recordings else "a recording that was never listed"
            _log.error("unaccounted: %s (%s) has no single terminal state", uri, recording_id)
            return
        metrics.count(f"recordings_{result.terminal_state.value}")
        yield result

    def _settle(
        self, recording: Recording, covered: list[Covered], failed: list[Failed], kept: list[Covered]
    ) -> RecordingResult | None:
        return settle(recording, covered, failed, asked_of(recording, self._asked), kept=kept)


def asked_of(recording: Recording, tasks: frozenset[str]) -> frozenset[str]:
    """What must be answered for a recording: the tasks asked of all, and its own questions, by `task_key`."""
    own = {task_key("answer", question.question_id) for question in recording.questions if question.question_id}
    return tasks | own


def _recording_pair(recording: Recording) -> tuple[str, Recording]:
    return recording.recording_id, recording


def _answer_pair(answer: Answer) -> tuple[str, Covered]:
    return answer.recording_id, covered_by(answer)


def failed_by(letter: DeadLetter) -> Failed:
    """What a dead letter says."""
    return Failed(letter.dead_letter_key, letter.reason.value, letter.input, letter.run_id)


def _dead_letter_pair(letter: DeadLetter) -> tuple[str, Failed]:
    return letter.recording_id, failed_by(letter)


class ReconcileRecordings(beam.PTransform):
    """Gives one `RecordingResult` per recording found, from what became of it.

    Takes a dict of PCollections: `recordings` (all that were found), `answers`, `dead_letters`, and `kept` where
    earlier runs are resumed: (recording_id, `Covered`) of each of their answers that stands. A recording of which
    nothing became, or of which an answer is missing without a dead letter, gives no row; it is logged and counted as
    `unaccounted`, and fails the run that counts.

    Args:
        tasks: What was asked of every recording; a recording's own questions are known from it.
    """

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        super().__init__()
        self._asked = frozenset(task_key(task.name, task.question_id) for task in tasks)

    def expand(self, accounts: Any) -> Any:
        pairs = {
            "recordings": accounts["recordings"] | "RecordingId" >> beam.Map(_recording_pair),
            "answers": accounts["answers"] | "AnswerId" >> beam.Map(_answer_pair),
            "dead_letters": accounts["dead_letters"] | "DeadLetterId" >> beam.Map(_dead_letter_pair),
        }
        if "kept" in accounts:
            pairs["kept"] = accounts["kept"]
        return (
            pairs
            | "MeetById" >> beam.CoGroupByKey()
            | "Settle" >> beam.ParDo(_SettleDoFn(self._asked)).with_output_types(RecordingResult)
        )
