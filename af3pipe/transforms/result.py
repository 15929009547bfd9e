"""Builds a recording's result: its terminal state and its row, from its answers and dead letters."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from af3pipe.audio.levels import combine
from af3pipe.schemas import (
    ROUNDING_S,
    Answer,
    Covered,
    DeadLetter,
    Levels,
    Recording,
    RecordingResult,
    RecordingRow,
    TerminalState,
    task_key,
)
from af3pipe.tables.existing import ExistingRecording
from af3pipe.transforms.outcome import now_us, public_uri, recording_of

_NUMBERS = ("answers", "kept_answers", "dead_letters", "kept_dead_letters")
_LISTS = ("answer_keys", "dead_letter_keys", "reasons")
_OF_RECORDING = (
    *("recording_id", "source_key", "work_key", "size_bytes", "etag", "mtime"),
    *("offset_s", "channel", "stream", "metadata"),
)


class Unaccounted(Exception):
    """A recording ended without an answer or a dead letter for each task, which is a bug of this package."""


def covered_by(answer: Answer) -> Covered:
    """Returns the spans that an answer covers; an answer merged from several segments may have gaps."""
    pieces = tuple((piece.start_s, piece.end_s) for piece in answer.segments)
    return Covered(
        answer.answer_key,
        task_key(answer.task, answer.question_id),
        pieces or ((answer.start_s, answer.end_s),),
        answer.duration_s,
        answer.levels,
        answer.content_identity,
    )


def make_result(
    recording: Recording,
    answers: Sequence[Answer],
    dead_letters: Iterable[DeadLetter],
    requested: frozenset[str] = frozenset(),
    *,
    kept: Iterable[Covered] = (),
) -> RecordingResult:
    """Makes the result of a recording.

    The terminal state is `ok` if there are answers, no dead letters, and each task covers the requested span;
    `ok_partial` if there are answers but another condition fails; `dead_letter` if there are only dead letters.

    Args:
        recording: The recording.
        answers: New answers.
        dead_letters: All dead letters; those that an earlier run wrote have its `run_id`.
        requested: `task_key`s of the tasks that must have an answer unless there are dead letters.
        kept: Spans covered by answers of earlier runs that are reused.

    Raises:
        Unaccounted: A requested task has no answer although there are no dead letters.
    """
    new = {answer.answer_key: covered_by(answer) for answer in answers}
    covered = [*new.values(), *{found.answer_key: found for found in kept if found.answer_key not in new}.values()]
    letters = list({letter.dead_letter_key: letter for letter in dead_letters}.values())
    if not letters and not (covered and requested <= {found.task for found in covered}):
        raise Unaccounted(f"{recording.uri} ended without an answer to each task and without a dead letter")
    # That of the last segment: earlier segments only have the header's estimate.
    duration_s = max(covered, key=lambda found: found.pieces[-1][1]).duration_s if covered else None
    covered_s = _covered_s(covered)
    if not covered:
        state = TerminalState.DEAD_LETTER
    elif letters or covered_s < recording.wanted_until_s(duration_s) - recording.offset_s - ROUNDING_S:
        state = TerminalState.OK_PARTIAL
    else:
        state = TerminalState.OK
    new_letters = tuple(letter for letter in letters if not letter.run_id)
    row = _row(
        recording,
        terminal_state=state,
        duration_s=duration_s,
        covered_s=covered_s,
        answers=len(new),
        kept_answers=len(covered) - len(new),
        answer_keys=tuple(sorted(found.answer_key for found in covered)),
        dead_letters=len(new_letters),
        kept_dead_letters=len(letters) - len(new_letters),
        dead_letter_keys=tuple(sorted(letter.dead_letter_key for letter in letters)),
        reasons=tuple(sorted({letter.reason.value for letter in letters})),
        **_levels(covered),
    )
    return RecordingResult(row, tuple(answers), new_letters)


def repeated_result(recording: Recording, done: ExistingRecording) -> RecordingResult:
    """Makes the result of a recording that an earlier run has done, by repeating that run's row."""
    same = ("duration_s", "covered_s", "answer_keys", "dead_letter_keys", "reasons", *Levels._fields)
    columns = {name: getattr(done, name) for name in same}
    kept = {"kept_answers": len(done.answer_keys), "kept_dead_letters": len(done.dead_letter_keys)}
    return RecordingResult(_row(recording, terminal_state=TerminalState(done.terminal_state), **columns, **kept))


def gone_result(recording: Recording) -> RecordingResult:
    """Makes the result of a recording that no longer exists, as a correction of its manifest row changed its id."""
    return RecordingResult(_row(recording._replace(work_key=None), terminal_state=TerminalState.SKIPPED_DONE))


def _row(recording: Recording, **columns: Any) -> RecordingRow:
    """Makes a row of a recording; columns that are not given are empty."""
    empty = dict.fromkeys(RecordingRow._fields) | dict.fromkeys(_NUMBERS, 0) | dict.fromkeys(_LISTS, ())
    of_recording = {name: getattr(recording, name) for name in _OF_RECORDING}
    own = {"uri": public_uri(recording), "run_id": "", "created_at": now_us()}
    return RecordingRow(**{**empty, "covered_s": 0.0, **of_recording, **own, **columns})


def rejected_result(dead_letters: Sequence[DeadLetter]) -> RecordingResult:
    """Makes the result of a recording of which each manifest row was rejected before it was opened."""
    letters = sorted(dead_letters, key=lambda letter: letter.dead_letter_key)  # independent of their order
    first = letters[0]
    # The input of a dead letter masks what looks like a secret; the recording's own columns do not.
    recording = recording_of(first.input)._replace(recording_id=first.recording_id, metadata=first.metadata)
    return make_result(recording, (), letters)


def _covered_s(covered: Iterable[Covered]) -> float:
    """Returns the seconds that every answered task covers: those of the task that covers least."""
    by_task: dict[str, tuple[tuple[float, float], ...]] = defaultdict(tuple)
    for found in covered:
        by_task[found.task] += found.pieces
    return min((_length_s(pieces) for pieces in by_task.values()), default=0.0)


def _levels(covered: Iterable[Covered]) -> dict[str, Any]:
    """Returns the level columns, from the task that covers most, since all tasks measured the same samples."""
    by_task: dict[str, list[tuple[float, Levels]]] = defaultdict(list)
    for found in covered:
        by_task[found.task].append((_length_s(found.pieces), found.levels))
    # Sorted, so that a tie between tasks always has the same result.
    parts = max((by_task[task] for task in sorted(by_task)), key=_total_s, default=[])
    return combine(parts)._asdict() if parts else dict.fromkeys(Levels._fields)


def _total_s(parts: Iterable[tuple[float, Levels]]) -> float:
    return math.fsum(length_s for length_s, _ in parts)


def _length_s(pieces: Iterable[tuple[float, float]]) -> float:
    """Returns the seconds that the pieces cover; overlaps count once."""
    covered_s = reached_s = 0.0
    for start_s, end_s in sorted(pieces):
        covered_s += max(0.0, end_s - max(start_s, reached_s))
        reached_s = max(reached_s, end_s)
    return covered_s
