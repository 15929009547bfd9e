"""Every recording that was found, held against what became of it: one terminal state each."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import registry

from af3pipe.schemas import Answer, DeadLetter, Recording, RecordingResult, Stage, TerminalState
from af3pipe.transforms import metrics
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.outcome import now_us

_log = logging.getLogger(__name__)
_ROUNDING_S = 0.05
"""A remainder too short for one audio token (20 ms) is not asked about; less than this is no gap."""


class Covered(NamedTuple):
    """What an answer covers of its recording: all that reconciling needs of it.

    Attributes:
        task: Name and question.
        pieces: (start_s, end_s) of each part answered for.
        duration_s: Of the whole object, as far as was known with this answer.
    """

    task: str
    pieces: tuple[tuple[float, float], ...]
    duration_s: float | None


class Failed(NamedTuple):
    """What reconciling needs of a dead letter."""

    uri: str
    stage: str
    reason: str


for _row_class in (Covered, Failed):
    registry.register_coder(_row_class, RowTupleCoder)


def covered_by(answer: Answer) -> Covered:
    """What an answer says was covered; a stitched one lists its pieces, and may have gaps."""
    pieces = tuple((piece.start_s, piece.end_s) for piece in answer.segments)
    return Covered(
        f"{answer.task}/{answer.question_id}",
        pieces or ((answer.start_s, answer.end_s),),
        answer.duration_s,
    )


def settle(recording: Recording, covered: Sequence[Covered], failed: Sequence[Failed]) -> RecordingResult | None:
    """The terminal state of a recording; None when nothing at all became of it, which must not happen.

    `ok` when it has answers, no dead letter, and each task covers all that was wanted; `ok_partial` when it has
    answers but one of these does not hold; `dead_letter` when it has only dead letters.
    """
    if not covered and not failed:
        return None
    # The last segment's: only there has decoding reached the end; before it, this is the header's estimate.
    duration_s = max(covered, key=lambda found: found.pieces[-1][1]).duration_s if covered else None
    covered_s = _covered_s(covered)
    if not covered:
        state = TerminalState.DEAD_LETTER
    elif failed or covered_s < _wanted_s(recording, duration_s) - _ROUNDING_S:
        state = TerminalState.OK_PARTIAL
    else:
        state = TerminalState.OK
    return RecordingResult(
        recording_id=recording.recording_id,
        uri=recording.uri,
        terminal_state=state,
        duration_s=duration_s,
        covered_s=covered_s,
        answers=len(covered),
        dead_letters=len(failed),
        reasons=tuple(sorted({found.reason for found in failed})),
        size_bytes=recording.size_bytes,
        etag=recording.etag,
        mtime=recording.mtime,
        offset_s=recording.offset_s,
        metadata=recording.metadata,
        run_id="",
        created_at=now_us(),
    )


def _covered_s(covered: Iterable[Covered]) -> float:
    """Seconds that every answered task covers: of the task that covers least."""
    by_task: dict[str, float] = defaultdict(float)
    for found in covered:
        by_task[found.task] += sum(end - start for start, end in found.pieces)
    return min(by_task.values(), default=0.0)


def _wanted_s(recording: Recording, duration_s: float | None) -> float:
    available = 0.0 if duration_s is None else max(0.0, duration_s - recording.offset_s)
    return available if recording.duration_s is None else min(available, recording.duration_s)


class _SettleDoFn(beam.DoFn):
    def process(self, group: tuple[str, dict[str, Iterable[Any]]]) -> Iterator[RecordingResult]:
        recording_id, found = group
        covered, failed = list(found["answers"]), list(found["dead_letters"])
        recordings = list(found["recordings"])
        if not recordings and any(letter.stage == Stage.LIST.value for letter in failed):
            recordings = [Recording(recording_id, failed[0].uri)]  # rejected while listing: there is no more of it
        result = settle(recordings[0], covered, failed) if len(recordings) == 1 else None
        if result is None:
            metrics.count("unaccounted")
            uri = recordings[0].uri if recordings else "a recording that was never listed"
            _log.error("unaccounted: %s (%s) has no single terminal state", uri, recording_id)
            return
        metrics.count(f"recordings_{result.terminal_state.value}")
        yield result


def _recording_pair(recording: Recording) -> tuple[str, Recording]:
    return recording.recording_id, recording


def _answer_pair(answer: Answer) -> tuple[str, Covered]:
    return answer.recording_id, covered_by(answer)


def _dead_letter_pair(letter: DeadLetter) -> tuple[str, Failed]:
    return letter.recording_id, Failed(letter.uri, letter.stage.value, letter.reason.value)


class ReconcileRecordings(beam.PTransform):
    """Gives one `RecordingResult` per recording found, from what became of it.

    Takes a dict of three PCollections: `recordings` (all that were found), `answers`, `dead_letters`. A recording
    of which nothing became gives no row; it is logged and counted as `unaccounted`, and fails the run that counts.
    """

    def expand(self, accounts: Any) -> Any:
        pairs = {
            "recordings": accounts["recordings"] | "RecordingId" >> beam.Map(_recording_pair),
            "answers": accounts["answers"] | "AnswerId" >> beam.Map(_answer_pair),
            "dead_letters": accounts["dead_letters"] | "DeadLetterId" >> beam.Map(_dead_letter_pair),
        }
        return (
            pairs
            | "MeetById" >> beam.CoGroupByKey()
            | "Settle" >> beam.ParDo(_SettleDoFn()).with_output_types(RecordingResult)
        )
