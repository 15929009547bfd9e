"""Reads rows that earlier runs wrote, and decides which recordings and requests a new run can skip."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc

from af3pipe import storage
from af3pipe.schemas import (
    NO_METADATA,
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
from af3pipe.tables.formats import NotATable
from af3pipe.tables.keys import Mask
from af3pipe.tables.reader import read_file, table_files

_RETRYABLE = frozenset(reason.value for reason in Reason if reason.retryable)
_BATCH_ROWS = 16_384
_RECORDING_COLUMNS = (
    *("uri", "recording_id", "source_key", "work_key", "terminal_state", "settled_state", "answer_keys"),
    *("dead_letter_keys", "reasons", "metadata", "offset_s", "channel", "stream", "created_at"),
    *("duration_s", "covered_s", *Levels._fields),
)
_ANSWER_COLUMNS = (
    *("uri", "recording_id", "source_key", "answer_key", "task", "question_id", "start_s", "end_s", "segments"),
    *("duration_s", *Levels._fields, "etag", "size_bytes", "mtime", "metadata", "created_at"),
)
_LETTER_COLUMNS = ("uri", "recording_id", "dead_letter_key", "run_id")


class ExistingRecording(NamedTuple):
    """Has the columns of a row of `recordings/` that resuming needs. `source_key` is None in rows of format 1."""

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


class Place(NamedTuple):
    """Identifies a Parquet file of an output."""

    output: str
    table: str
    file: str


class ExistingAnswer(NamedTuple):
    """Has the columns of an answer that resuming needs, and the file of its row."""

    uri: str
    recording_id: str
    source_key: str | None
    covered: Covered
    metadata: str
    place: Place
    created_at: int


class ExistingLetter(NamedTuple):
    """Has the columns of a row of `dead_letters/` that resuming needs."""

    uri: str
    recording_id: str
    dead_letter_key: str
    run_id: str


ExistingRow = ExistingRecording | ExistingAnswer | ExistingLetter


def read_existing(
    output: str, table: str, info: ObjectInfo, wanted: Callable[[pa.Table], Mask] | None = None
) -> Iterator[ExistingRow]:
    """Reads the columns that resuming needs from one Parquet file of an output.

    Args:
        output: Folder of the tables.
        table: Table of the file.
        info: The file as it was listed; a compaction may have replaced it since.
        wanted: Takes rows with the columns `uri` and `recording_id` and returns which of them to read; default: all.

    Raises:
        StorageError: The file cannot be read. Skipping it would silently process its recordings again.
    """
    columns, make = _READERS.get(table, (_ANSWER_COLUMNS, _answer))
    place = Place(output, table, info.uri)
    try:
        for rows in read_file(output, table, info, columns):
            kept = rows if wanted is None else rows.filter(pa.array(wanted(rows)))
            for batch in kept.to_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield make(row, place)
    except Rejected as rejected:
        raise _unusable(info.uri, rejected.detail) from rejected
    except (NotATable, pa.ArrowException, OSError, AttributeError, TypeError, ValueError) as error:
        raise _unusable(info.uri, str(error).removeprefix(info.uri).strip()) from error


def existing_rows(output: str, wanted: Callable[[pa.Table], Mask] | None = None) -> Iterator[ExistingRow]:
    """Reads the rows of an output, as far as resuming needs them.

    Args:
        output: Folder of the tables.
        wanted: As of `read_existing`.

    Raises:
        StorageError, Rejected: It cannot be listed, or one of its files cannot be read.
    """
    for table, infos in table_files(output).items():
        for info in infos:
            yield from read_existing(output, table, info, wanted)


def _unusable(uri: str, why: str) -> storage.StorageError:
    return storage.StorageError(
        f"{uri}, with rows of earlier runs, cannot be used: {why}. Start the run again if another program was "
        "writing to the output; else move the file away (its recordings are then processed again), or write elsewhere"
    )


def _recording(row: Mapping[str, Any], _: Place) -> ExistingRecording:
    is_skip = row["terminal_state"] == TerminalState.SKIPPED_DONE.value
    found = {name: row[name] for name in ExistingRecording._fields}
    for name in ("answer_keys", "dead_letter_keys", "reasons"):
        found[name] = tuple(found[name] or ())
    return ExistingRecording(
        **found
        | {
            "terminal_state": (is_skip and row["settled_state"]) or row["terminal_state"],
            "metadata": row["metadata"] or NO_METADATA,
            "covered_s": row["covered_s"] or 0.0,
            "created_at": _microseconds(row["created_at"]),
        }
    )


def _answer(row: Mapping[str, Any], place: Place) -> ExistingAnswer:
    pieces = tuple((piece["start_s"], piece["end_s"]) for piece in row["segments"] or ())
    covered = Covered(
        row["answer_key"],
        task_key(row["task"], row["question_id"]),
        pieces or ((row["start_s"], row["end_s"]),),
        row["duration_s"],
        Levels(row["peak_dbfs"], row["rms_dbfs"], row["clipped_share"], row["silent"]),
        row["etag"] or f"{row['size_bytes']}:{_iso(row['mtime'])}",
    )
    metadata = row["metadata"] or NO_METADATA
    created_at = _microseconds(row["created_at"])
    return ExistingAnswer(row["uri"], row["recording_id"], row["source_key"], covered, metadata, place, created_at)


def _letter(row: Mapping[str, Any], _: Place) -> ExistingLetter:
    return ExistingLetter(row["uri"], row["recording_id"], row["dead_letter_key"], row["run_id"])


def _iso(value: datetime | None) -> str | None:
    """Converts a modification time to the ISO 8601 text that `Recording` has."""
    return None if value is None else value.isoformat()


def _microseconds(value: datetime) -> int:
    return round(value.timestamp() * 1e6)


_READERS: dict[str, tuple[Sequence[str], Callable[[Mapping[str, Any], Place], ExistingRow]]] = {
    "recordings": (_RECORDING_COLUMNS, _recording),
    "dead_letters": (_LETTER_COLUMNS, _letter),
}


def read_answers(wanted: Iterable[ExistingAnswer]) -> list[Answer]:
    """Reads the complete rows of these answers.

    Raises:
        StorageError: A file cannot be read.
    """
    by_place: dict[Place, list[tuple[str, str]]] = defaultdict(list)
    for found in wanted:
        by_place[found.place].append((found.recording_id, found.covered.answer_key))
    answers: dict[tuple[str, str], Answer] = {}
    for place, keys in by_place.items():
        rows = _rows_of(place)
        among = pa.array([key for _, key in keys], pa.string())
        for row in rows.filter(pc.is_in(rows["answer_key"], value_set=among)).to_pylist():
            if (row["recording_id"], row["answer_key"]) in keys:
                answers[row["recording_id"], row["answer_key"]] = _whole(row)
    return list(answers.values())


@lru_cache(2)
def _rows_of(place: Place) -> pa.Table:
    """Reads a file; caches the last two files, because the next object's answers are often in the same file."""
    try:
        info = ObjectInfo(place.file, None, None, None)
        return pa.concat_tables(read_file(place.output, place.table, info), promote_options="default")
    except Rejected as rejected:
        raise _unusable(place.file, rejected.detail) from rejected
    except (NotATable, pa.ArrowException, OSError) as error:
        raise _unusable(place.file, str(error)) from error


def _whole(columns: dict[str, Any]) -> Answer:
    found: dict[str, Any] = {name: columns[name] for name in Answer._fields}
    for name, hint in get_type_hints(Answer).items():
        if str(hint).startswith("tuple"):
            found[name] = tuple(found[name] or ())
    return Answer(
        **found
        | {
            "source_key": found["source_key"] or "",
            "mtime": _iso(found["mtime"]),
            "segments": tuple(TimedText(**piece) for piece in found["segments"]),
            "metadata": found["metadata"] or NO_METADATA,
            "created_at": _microseconds(columns["created_at"]),
        }
    )


class ExistingRows:
    """Groups the rows that earlier runs wrote about one object, by kind.

    Attributes:
        recordings: Newest first.
        dead_letters: recording_id to dead_letter_key to the id of the first run that wrote that dead letter.
    """

    def __init__(self, rows: Iterable[ExistingRow] = ()) -> None:
        self.recordings: list[ExistingRecording] = []
        self.dead_letters: dict[str, dict[str, str]] = defaultdict(dict)
        self._answers: dict[str, list[ExistingAnswer]] = defaultdict(list)
        # Rows of format 1 have no source_key; where a manifest gave no id, their recording_id is the same hash.
        self._answers_by_source: dict[str, list[ExistingAnswer]] = defaultdict(list)
        self._by_id: dict[str, list[ExistingRecording]] = defaultdict(list)
        for row in rows:
            if isinstance(row, ExistingRecording):
                self.recordings.append(row)
            elif isinstance(row, ExistingAnswer):
                self._answers[row.recording_id].append(row)
                self._answers_by_source[row.source_key or row.recording_id].append(row)
            else:
                runs = self.dead_letters[row.recording_id]
                runs[row.dead_letter_key] = min(row.run_id, runs.get(row.dead_letter_key, row.run_id))
        self.recordings.sort(key=lambda row: row.created_at, reverse=True)
        for found in self.recordings:
            self._by_id[found.recording_id].append(found)

    def done(self, recording: Recording, *, retry: bool = False) -> ExistingRecording | None:
        """Returns the row of an earlier run that makes processing this recording again unnecessary, or None.

        Such a row has the same `work_key` and metadata, all answers and dead letters that it references still exist,
        none of its dead letters is retryable, and no newer row has other metadata.

        Args:
            recording: With its `work_key`.
            retry: Whether a recording with dead letters always counts as not done.
        """
        if not (recording.etag or recording.mtime):
            return None  # some web servers state neither: a change could not be noticed
        own = self._by_id.get(recording.recording_id, ())
        if not own or not is_same_metadata(own[0], recording.metadata):
            return None
        answers = {found.covered.answer_key for found in self._own_answers(recording)}
        for row in own:
            if (
                row.work_key == recording.work_key
                and is_same_metadata(row, recording.metadata)
                and answers.issuperset(row.answer_keys)
                and self._letters_are_final(row, retry=retry)
            ):
                return row
        return None

    def is_latest(self, row: ExistingRecording) -> bool:
        """Returns whether a row is the newest one of its recording, which is the one in the latest view."""
        return row is self._by_id[row.recording_id][0]

    def is_rejected(self, letters: Sequence[DeadLetter], *, retry: bool = False) -> bool:
        """Returns whether an earlier run rejected a recording for the same reasons, none of which is retryable."""
        keys = {letter.dead_letter_key for letter in letters}
        return any(
            keys == set(row.dead_letter_keys) and not row.answer_keys and self._letters_are_final(row, retry=retry)
            for row in self._by_id.get(letters[0].recording_id, ())
        )

    def _letters_are_final(self, row: ExistingRecording, *, retry: bool) -> bool:
        are_there = self.dead_letters.get(row.recording_id, {}).keys() >= set(row.dead_letter_keys)
        return are_there and not (row.dead_letter_keys if retry else _RETRYABLE & set(row.reasons))

    def of(self, recording: Recording) -> tuple[Recording, list[ExistingAnswer]]:
        """Adds its existing rows to a recording; also returns answers to copy from recordings of the same audio."""
        if not (recording.etag or recording.mtime):
            return recording, []
        own = {found.covered.answer_key: found for found in self._own_answers(recording)}
        of_source = [
            found
            for key in dict.fromkeys((recording.source_key, recording.recording_id))
            for found in self._answers_by_source.get(key, ())
        ]
        copied = {found.covered.answer_key: found for found in of_source if found.covered.answer_key not in own}
        both = own | copied
        existing = Existing(
            tuple(both[key].covered for key in sorted(both)),
            tuple(sorted(self.dead_letters.get(recording.recording_id, {}).items())),
        )
        return recording._replace(existing=existing), list(copied.values())

    def with_first_run(self, letters: Iterable[DeadLetter]) -> tuple[DeadLetter, ...]:
        """Sets each dead letter's `run_id` to the first run that wrote it; empty if none did."""
        return tuple(
            letter._replace(run_id=self.dead_letters.get(letter.recording_id, {}).get(letter.dead_letter_key, ""))
            for letter in letters
        )

    def _own_answers(self, recording: Recording) -> Iterator[ExistingAnswer]:
        """Yields the newest row of each answer to the recording, if that row has the recording's metadata."""
        newest: dict[str, ExistingAnswer] = {}
        for found in self._answers.get(recording.recording_id, ()):
            key = found.covered.answer_key
            newest[key] = max(newest.get(key, found), found, key=lambda answer: answer.created_at)
        yield from (found for found in newest.values() if is_same_metadata(found, recording.metadata))


def copy_of(answer: Answer, recording: Recording, uri: str) -> Answer:
    """Copies an answer of an earlier run to another recording of the same audio."""
    return answer._replace(
        recording_id=recording.recording_id,
        uri=uri,
        source_key=recording.source_key,
        metadata=recording.metadata,
        run_id="",
    )


def is_same_metadata(there: ExistingRecording | ExistingAnswer, here: str) -> bool:
    """Returns whether a row has this metadata; rows of format 1 (without source_key) have numbers as text."""
    return there.metadata == here or (there.source_key is None and there.metadata == _as_text(here))


def _as_text(metadata: str) -> str:
    values = json.loads(metadata).items()
    return to_metadata(
        {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for name, value in values}
    )


def is_other_source(there: ExistingRecording, recording: Recording) -> bool:
    """Returns whether an earlier row has this recording's id but other audio; format 1 does not record durations."""
    if there.terminal_state == TerminalState.SKIPPED_DONE.value and not there.answer_keys:
        return False  # of a manifest row that was corrected since
    if there.source_key is not None:
        return there.source_key != recording.source_key
    span = recording.uri, recording.offset_s, recording.channel, recording.stream
    return (there.uri, there.offset_s, there.channel, there.stream) != span
