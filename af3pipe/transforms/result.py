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
from af3pipe.transforms.outcome import now_us, public_uri, recording_of

_NOTHING = Covered("", "", ((0.0, 1.0),), None, Levels(0.0, 0.0, 0.0, False))


class Unaccounted(Exception):
    """A recording came to its end without an answer or a dead letter for each task: a fault of this package."""


def covered_by(answer: Answer) -> Covered:
    """Returns what an answer covers; an answer merged of several segments lists them, and may have gaps."""
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

    `ok` when it has answers, no dead letter, and each task covers all that was wanted; `ok_partial` when it has
    answers but one of these is not so; `dead_letter` when it has only dead letters.

    Args:
        recording: Which.
        answers: New ones.
        dead_letters: All; those that an earlier run has written say which.
        requested: By `task_key`: each of these tasks has answers, or there is a dead letter that says why not.
        kept: What answers of earlier runs cover, as far as they are to the requests of this run.

    Raises:
        Unaccounted: A requested task has no answer, and there is no dead letter.
    """
    new = {answer.answer_key: covered_by(answer) for answer in answers}
    covered = [*new.values(), *{found.answer_key: found for found in kept if found.answer_key not in new}.values()]
    letters = list({letter.dead_letter_key: letter for letter in dead_letters}.values())
    if not letters and not (covered and requested <= {found.task for found in covered}):
        raise Unaccounted(
            f"{recording.uri} came to its end without an answer to each task, and without a dead letter"
        )
    # The last segment's: only there has decoding reached the end; before it, this is the header's estimate.
    duration_s = max(covered, key=lambda found: found.pieces[-1][1]).duration_s if covered else None
    covered_s = _covered_s(covered)
    if not covered:
        state = TerminalState.DEAD_LETTER
    elif letters or covered_s < recording.wanted_until_s(duration_s) - recording.offset_s - ROUNDING_S:
        state = TerminalState.OK_PARTIAL
    else:
        state = TerminalState.OK
    new_letters = tuple(letter for letter in letters if not letter.run_id)
    row = RecordingRow(
        recording_id=recording.recording_id,
        uri=public_uri(recording),
        source_key=recording.source_key,
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
        work_key=recording.work_key,
        **_levels(covered),
        size_bytes=recording.size_bytes,
        etag=recording.etag,
        mtime=recording.mtime,
        offset_s=recording.offset_s,
        channel=recording.channel,
        stream=recording.stream,
        metadata=recording.metadata,
        run_id="",
        created_at=now_us(),
    )
    return RecordingResult(row, tuple(answers), new_letters)


def gone_result(recording: Recording) -> RecordingResult:
    """Makes the result of what is no recording any more: its manifest row was corrected, and has another id now."""
    result = make_result(recording, (), (), kept=(_NOTHING,))
    levels = dict.fromkeys(Levels._fields)
    row = result.row._asdict() | levels | {"terminal_state": TerminalState.SKIPPED_DONE, "work_key": None}
    nothing = {"kept_answers": 0, "answer_keys": (), "duration_s": None, "covered_s": 0.0}
    return RecordingResult(RecordingRow(**row | nothing))


def rejected_result(dead_letters: Sequence[DeadLetter]) -> RecordingResult:
    """Makes the result of a recording that was rejected before it was opened, by each manifest row that names it."""
    letters = sorted(dead_letters, key=lambda letter: letter.dead_letter_key)  # in whatever order they come
    first = letters[0]
    # The input of a dead letter masks what looks like a secret; the recording's own columns do not.
    recording = recording_of(first.input)._replace(recording_id=first.recording_id, metadata=first.metadata)
    return make_result(recording, (), letters)


def _covered_s(covered: Iterable[Covered]) -> float:
    """Seconds that every answered task covers: of the task that covers least."""
    by_task: dict[str, tuple[tuple[float, float], ...]] = defaultdict(tuple)
    for found in covered:
        by_task[found.task] += found.pieces
    return min((_length_s(pieces) for pieces in by_task.values()), default=0.0)


def _levels(covered: Iterable[Covered]) -> dict[str, Any]:
    """The level columns: by the task that covers most, since all measured the same samples."""
    by_task: dict[str, list[tuple[float, Levels]]] = defaultdict(list)
    for found in covered:
        by_task[found.task].append((_length_s(found.pieces), found.levels))
    # Sorted, so that tasks that cover as much give the same to the last digit, whatever order they come in.
    parts = max((by_task[task] for task in sorted(by_task)), key=_total_s, default=[])
    return combine(parts)._asdict() if parts else dict.fromkeys(Levels._fields)


def _total_s(parts: Iterable[tuple[float, Levels]]) -> float:
    return math.fsum(length_s for length_s, _ in parts)


def _length_s(pieces: Iterable[tuple[float, float]]) -> float:
    """Seconds under the pieces; what two of them cover counts once."""
    covered_s = reached_s = 0.0
    for start_s, end_s in sorted(pieces):
        covered_s += max(0.0, end_s - max(start_s, reached_s))
        reached_s = max(reached_s, end_s)
    return covered_s
