"""Reads what earlier runs wrote about given objects, and decides what of it need not be done again."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from af3pipe import storage
from af3pipe.schemas import (
    Answer,
    Covered,
    DeadLetter,
    Existing,
    Levels,
    Reason,
    Recording,
    Rejected,
    TerminalState,
    TimedText,
    task_key,
    to_metadata,
)
from af3pipe.storage import ObjectInfo
from af3pipe.storage.parquet import ParquetFile

_RETRYABLE = frozenset(reason.value for reason in Reason if reason.retryable)
_BATCH_ROWS = 16_384
_RECORDING_COLUMNS = (
    *("uri", "recording_id", "source_key", "work_key", "terminal_state", "settled_state", "answer_keys"),
    *("dead_letter_keys", "reasons", "metadata", "offset_s", "channel", "stream", "created_at"),
    *("duration_s", "covered_s", *Levels._fields),
)
_ANSWER_COLUMNS = (
    *("uri", "recording_id", "source_key", "answer_key", "task", "question_id", "start_s", "end_s", "segments"),
    *("duration_s", *Levels._fields, "etag", "size_bytes", "mtime", "metadata"),
)
_LETTER_COLUMNS = ("uri", "recording_id", "dead_letter_key", "run_id")


class ExistingRecording(NamedTuple):
    """What resuming needs of a row of `recordings/`. `source_key` is None in rows of format 1."""

    uri: str
    recording_id: str
    source_key: str | None
    work_key: str | None
    terminal_state: str
    answer_keys: tuple[str, ...]
    dead_letter_keys: tuple[str, ...]
    reasons: tuple[str, ...]
    metadata: str
    offset_s: float
    channel: str
    stream: int | None
    duration_s: float | None
    covered_s: float
    peak_dbfs: float | None
    rms_dbfs: float | None
    clipped_share: float | None
    silent: bool | None
    created_at: int


class ExistingAnswer(NamedTuple):
    """What resuming needs of an answer, and where its row is: a file, and a row's number in it."""

    uri: str
    recording_id: str
    source_key: str | None
    covered: Covered
    metadata: str
    file: str
    row: int


class ExistingLetter(NamedTuple):
    """What resuming needs of a row of `dead_letters/`."""

    uri: str
    recording_id: str
    dead_letter_key: str
    run_id: str


ExistingRow = ExistingRecording | ExistingAnswer | ExistingLetter


def read_existing(
    table: str, info: ObjectInfo, wanted: Callable[[pa.RecordBatch], npt.NDArray[np.bool_]] | None = None
) -> Iterator[ExistingRow]:
    """Reads the rows of one Parquet file of an output, as far as resuming needs them.

    Args:
        table: That the file is of.
        info: The file.
        wanted: Which rows of a batch with the columns `uri` and `recording_id` to read; all by default.

    Raises:
        StorageError: It cannot be read. To pass over it would be to process its recordings again.
    """
    columns, make = _READERS.get(table, (_ANSWER_COLUMNS, _answer))
    try:
        with storage.open_input(info.uri, size_bytes=info.size_bytes) as file:
            parquet = ParquetFile(file)
            names = [name for name in columns if name in parquet.schema_arrow.names]
            first = 0
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=names):
                rows = np.arange(first, first + len(batch))
                first += len(batch)
                if wanted is not None:
                    mask = wanted(batch)
                    if not mask.any():
                        continue
                    batch, rows = batch.filter(pa.array(mask)), rows[mask]
                for number, row in zip(rows, batch.to_pylist(), strict=True):
                    yield make(defaultdict(_none, row), info.uri, int(number))
    except Rejected as rejected:
        raise _unusable(info.uri, rejected.detail) from rejected
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _unusable(info.uri, str(error)) from error


def _none() -> None:
    return None


def _unusable(uri: str, why: str) -> storage.StorageError:
    return storage.StorageError(
        f"{uri}, with rows of earlier runs, cannot be used: {why}. Start the run again if another program was "
        "writing to the output; else move the file away (its recordings are then processed again), or write elsewhere"
    )


def _recording(row: Mapping[str, Any], _: str, __: int) -> ExistingRecording:
    created: datetime = row["created_at"]
    return ExistingRecording(
        row["uri"],
        row["recording_id"],
        row["source_key"],
        row["work_key"],
        row["settled_state"] or row["terminal_state"],
        tuple(row["answer_keys"] or ()),
        tuple(row["dead_letter_keys"] or ()),
        tuple(row["reasons"] or ()),
        _metadata(row["metadata"]),
        row["offset_s"] or 0.0,
        row["channel"] or "mix",
        row["stream"],
        row["duration_s"],
        row["covered_s"] or 0.0,
        row["peak_dbfs"],
        row["rms_dbfs"],
        row["clipped_share"],
        row["silent"],
        round(created.timestamp() * 1e6),
    )


def _answer(row: Mapping[str, Any], uri: str, number: int) -> ExistingAnswer:
    pieces = tuple((piece["start_s"], piece["end_s"]) for piece in row["segments"] or ())
    covered = Covered(
        row["answer_key"],
        task_key(row["task"], row["question_id"]),
        pieces or ((row["start_s"], row["end_s"]),),
        row["duration_s"],
        Levels(row["peak_dbfs"], row["rms_dbfs"], row["clipped_share"], row["silent"]),
        row["etag"] or f"{row['size_bytes']}:{_iso(row['mtime'])}",
    )
    return ExistingAnswer(
        row["uri"], row["recording_id"], row["source_key"], covered, _metadata(row["metadata"]), uri, number
    )


def _letter(row: Mapping[str, Any], _: str, __: int) -> ExistingLetter:
    return ExistingLetter(row["uri"], row["recording_id"], row["dead_letter_key"], row["run_id"])


def _metadata(value: Any) -> str:
    """As JSON text; format 1 has a map."""
    return value if isinstance(value, str) else to_metadata(dict(value or ()))


def _iso(value: Any) -> str | None:
    """A modification time as `Recording` has it; format 1 has text."""
    return value.isoformat() if isinstance(value, datetime) else value


_READERS: dict[str, tuple[Sequence[str], Callable[[Mapping[str, Any], str, int], ExistingRow]]] = {
    "recordings": (_RECORDING_COLUMNS, _recording),
    "dead_letters": (_LETTER_COLUMNS, _letter),
}


def read_answers(places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Answer]:
    """Reads whole answers by file and row.

    Raises:
        StorageError: A file cannot be read.
    """
    by_file: dict[str, list[int]] = defaultdict(list)
    for file, row in places:
        by_file[file].append(row)
    found: dict[tuple[str, int], Answer] = {}
    for file, rows in by_file.items():
        table = _answer_table(file).take(rows)
        found.update(((file, row), _whole(columns)) for row, columns in zip(rows, table.to_pylist(), strict=True))
    return found


@lru_cache(4)
def _answer_table(uri: str) -> pa.Table:
    try:
        with storage.open_input(uri) as file:
            return ParquetFile(file).read()
    except Rejected as rejected:
        raise _unusable(uri, rejected.detail) from rejected
    except (pa.ArrowException, OSError) as error:
        raise _unusable(uri, str(error)) from error


def _whole(columns: dict[str, Any]) -> Answer:
    hints = get_type_hints(Answer)
    found: dict[str, Any] = {name: columns.get(name) for name in Answer._fields}
    for name, hint in hints.items():
        if str(hint).startswith("tuple"):
            found[name] = tuple(found[name] or ())
    created: datetime = columns["created_at"]
    return Answer(
        **found
        | {
            "source_key": found["source_key"] or "",
            "mtime": _iso(found["mtime"]),
            "segments": tuple(TimedText(**piece) for piece in found["segments"]),
            "metadata": _metadata(found["metadata"]),
            "created_at": round(created.timestamp() * 1e6),
        }
    )


class ExistingRows:
    """All that earlier runs wrote about one object, by kind.

    Attributes:
        recordings: Newest first.
        answers: Of any recording, model and prompt.
        dead_letters: By recording_id, then by key: the first run that wrote it, which is the one that counts.
    """

    def __init__(self, rows: Iterable[ExistingRow] = ()) -> None:
        self.recordings: list[ExistingRecording] = []
        self.answers: list[ExistingAnswer] = []
        self.dead_letters: dict[str, dict[str, str]] = defaultdict(dict)
        for row in rows:
            if isinstance(row, ExistingRecording):
                self.recordings.append(row)
            elif isinstance(row, ExistingAnswer):
                self.answers.append(row)
            else:
                runs = self.dead_letters[row.recording_id]
                runs[row.dead_letter_key] = min(row.run_id, runs.get(row.dead_letter_key, row.run_id))
        self.recordings.sort(key=lambda row: row.created_at, reverse=True)

    def done(self, recording: Recording, *, retry: bool = False) -> ExistingRecording | None:
        """The row of an earlier run that has done all that is requested of a recording, and would not end otherwise.

        So it is when a row has the same work and metadata, all rows that it names are still there, and none of its
        dead letters is one that the next attempt may not meet.

        Args:
            recording: With its `work_key`.
            retry: Whether a recording with dead letters is never done.
        """
        if not (recording.etag or recording.mtime):
            return None  # some web servers: nobody can tell whether it is what it was
        answers = {found.covered.answer_key for found in self._own_answers(recording)}
        for row in self.recordings:
            if (
                row.recording_id == recording.recording_id
                and row.work_key == recording.work_key
                and is_same_metadata(row.metadata, recording.metadata)
                and answers.issuperset(row.answer_keys)
                and self._letters_are_final(row, retry=retry)
            ):
                return row
        return None

    def is_latest(self, row: ExistingRecording) -> bool:
        """Whether a row is the newest of its recording: the one that the latest view has."""
        return row is next(found for found in self.recordings if found.recording_id == row.recording_id)

    def is_rejected(self, letters: Sequence[DeadLetter], *, retry: bool = False) -> bool:
        """Whether an earlier run has rejected a recording for the same reasons, which the next attempt meets, too."""
        keys = {letter.dead_letter_key for letter in letters}
        return any(
            row.recording_id == letters[0].recording_id
            and keys == set(row.dead_letter_keys)
            and not row.answer_keys
            and self._letters_are_final(row, retry=retry)
            for row in self.recordings
        )

    def _letters_are_final(self, row: ExistingRecording, *, retry: bool) -> bool:
        are_there = self.dead_letters.get(row.recording_id, {}).keys() >= set(row.dead_letter_keys)
        return are_there and not (row.dead_letter_keys if retry else _RETRYABLE & set(row.reasons))

    def of(self, recording: Recording) -> tuple[Recording, list[ExistingAnswer]]:
        """A recording with what need not be done again for it, and the answers of it that are to be copied."""
        if not (recording.etag or recording.mtime):
            return recording, []
        own = {found.covered.answer_key: found for found in self._own_answers(recording)}
        copied = {
            found.covered.answer_key: found
            for found in self.answers
            if found.covered.answer_key not in own and _is_same_source(found, recording)
        }
        both = own | copied
        existing = Existing(
            tuple(both[key].covered for key in sorted(both)),
            tuple(sorted(self.dead_letters.get(recording.recording_id, {}).items())),
        )
        return recording._replace(existing=existing), list(copied.values())

    def with_first_run(self, letters: Iterable[DeadLetter]) -> tuple[DeadLetter, ...]:
        """Dead letters, each with the run that wrote it first; without one where none has."""
        return tuple(
            letter._replace(run_id=self.dead_letters.get(letter.recording_id, {}).get(letter.dead_letter_key, ""))
            for letter in letters
        )

    def _own_answers(self, recording: Recording) -> Iterator[ExistingAnswer]:
        for found in self.answers:
            is_own = found.recording_id == recording.recording_id
            if is_own and is_same_metadata(found.metadata, recording.metadata):
                yield found


def _is_same_source(found: ExistingAnswer, recording: Recording) -> bool:
    """Rows of format 1 have no source_key; where a manifest gave no id, their recording_id is the same hash."""
    return (found.source_key or found.recording_id) in (recording.source_key, recording.recording_id)


def copy_of(answer: Answer, recording: Recording, uri: str) -> Answer:
    """Makes of an answer of an earlier run a row of another recording of the same audio."""
    return answer._replace(
        recording_id=recording.recording_id,
        uri=uri,
        source_key=recording.source_key,
        metadata=recording.metadata,
        run_id="",
    )


def is_same_metadata(there: str, here: str) -> bool:
    """Whether two `metadata` columns say the same; format 1 wrote numbers as text."""
    return there == here or there == _as_text(here)


def _as_text(metadata: str) -> str:
    values = json.loads(metadata).items()
    return to_metadata(
        {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for name, value in values}
    )


def is_other_source(there: ExistingRecording, recording: Recording) -> bool:
    """Whether an earlier run gave a recording's id to other audio; rows of format 1 do not say for which duration."""
    if there.terminal_state == TerminalState.SKIPPED_DONE.value and not there.answer_keys:
        return False  # of a manifest row that was corrected since
    if there.source_key is not None:
        return there.source_key != recording.source_key
    span = recording.uri, recording.offset_s, recording.channel, recording.stream
    return (there.uri, there.offset_s, there.channel, there.stream) != span
