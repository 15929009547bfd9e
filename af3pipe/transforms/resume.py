"""What earlier runs left in the same output, held against what there is to do: nothing is paid for twice."""

import pickle
import sqlite3
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
from apache_beam.coders import registry

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.schemas import (
    Covered,
    DeadLetter,
    Earlier,
    Levels,
    Reason,
    Recording,
    RecordingResult,
    Rejected,
    TerminalState,
    task_key,
    work_key,
)
from af3pipe.storage.parquet import ParquetFile
from af3pipe.tables.layout import is_file_of
from af3pipe.transforms import metrics
from af3pipe.transforms.ask import AskAudioFlamingo, AskDoFn
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.decode import DecodeAudio, DecodeDoFn
from af3pipe.transforms.outcome import DEAD_LETTERS, by_id, split_input
from af3pipe.transforms.reconcile import own_columns
from af3pipe.transforms.stores import set_storage

_RETRYABLE = frozenset(reason.value for reason in Reason if reason.retryable)
_COVERED_BY = ["start_s", "end_s", "segments", "duration_s", *Levels._fields, "etag", "size_bytes", "mtime"]
_BATCH_ROWS = 4096
_SKIPPED = "skipped"


class Settled(NamedTuple):
    """How an earlier run left a recording: what resuming needs of a row of `recordings/`."""

    work_key: str | None
    settled_state: TerminalState
    duration_s: float | None
    covered_s: float
    answer_keys: tuple[str, ...]
    dead_letter_keys: tuple[str, ...]
    reasons: tuple[str, ...]
    peak_dbfs: float | None
    rms_dbfs: float | None
    clipped_share: float | None
    silent: bool | None
    created_at: int


class Told(NamedTuple):
    """A dead letter that an earlier run wrote."""

    dead_letter_key: str
    run_id: str


for _row_class in (Settled, Told):
    registry.register_coder(_row_class, RowTupleCoder)


def earlier_files(output: str) -> list[tuple[str, str]]:
    """(table, URI) of each Parquet file that there is."""
    tables = ("recordings", "dead_letters", *ANSWER_TABLES)
    return [
        (table, uri)
        for table in tables
        for uri in storage.list_files(storage.join(output, table))
        if uri.endswith(".parquet")
    ]


def read_earlier(table: str, uri: str) -> Iterator[tuple[str, Settled | Covered | Told]]:
    """What a Parquet file of an output says, by recording_id.

    Raises:
        StorageError: It cannot be read, or is none that this version wrote. To pass over it would be to pay again.
    """
    columns, make = _READERS.get(table, (["answer_key", "task", "question_id", *_COVERED_BY], _covered))
    columns = ["recording_id", *columns]
    for batch in _batches(table, uri, columns):
        for row in batch.to_pylist():
            yield row["recording_id"], make(row)


def _batches(table: str, uri: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        with storage.open_input(uri) as file:
            parquet = ParquetFile(file)
            missing = sorted(set(columns) - set(parquet.schema_arrow.names))
            if missing:
                raise _unusable(uri, f"it has no column {', '.join(missing)}, as rows of {table} have here")
            yield from parquet.iter_batches(_BATCH_ROWS, columns=columns)
    except Rejected as rejected:
        raise _unusable(uri, rejected.detail) from rejected
    except (pa.ArrowException, OSError) as error:
        raise _unusable(uri, str(error)) from error


def _unusable(uri: str, why: str) -> storage.StorageError:
    return storage.StorageError(
        f"{uri}, of earlier runs' rows, cannot be used: {why}. Start the run again where another program was at work "
        "in the output; else move the file away, whose rows are then asked for again, or write to another output"
    )


def _settled(row: dict[str, Any]) -> Settled:
    created: datetime = row["created_at"]
    found = {name: row[name] for name in Settled._fields} | {"created_at": round(created.timestamp() * 1e6)}
    for name in ("answer_keys", "dead_letter_keys", "reasons"):
        found[name] = tuple(found[name])
    return Settled(**found | {"settled_state": TerminalState(row["settled_state"])})


def _covered(row: dict[str, Any]) -> Covered:
    pieces = tuple((piece["start_s"], piece["end_s"]) for piece in row["segments"] or ())
    return Covered(
        row["answer_key"],
        task_key(row["task"], row["question_id"]),
        pieces or ((row["start_s"], row["end_s"]),),
        row["duration_s"],
        Levels(row["peak_dbfs"], row["rms_dbfs"], row["clipped_share"], row["silent"]),
        row["etag"] or f"{row['size_bytes']}:{row['mtime']}",
    )


def _told(row: dict[str, Any]) -> Told:
    return Told(row["dead_letter_key"], row["run_id"])


_READERS: dict[str, tuple[Sequence[str], Callable[[dict[str, Any]], Settled | Covered | Told]]] = {
    "recordings": (Settled._fields, _settled),
    "dead_letters": (Told._fields, _told),
}


def split_earlier(
    rows: Iterable[Settled | Covered | Told],
) -> tuple[list[Settled], list[Covered], list[Told]]:
    """What earlier runs left of one recording, by kind."""
    rows = list(rows)
    return (
        [row for row in rows if isinstance(row, Settled)],
        [row for row in rows if isinstance(row, Covered)],
        [row for row in rows if isinstance(row, Told)],
    )


def _first_told(told: Iterable[Told]) -> dict[str, str]:
    """By key, the first run to tell a dead letter: the one that counts."""
    return dict(sorted(told, reverse=True))


def with_first_run(letters: Iterable[DeadLetter], told: Iterable[Told]) -> tuple[DeadLetter, ...]:
    """Dead letters, each with the run that told it before; without one where none did."""
    first_told = _first_told(told)
    return tuple(letter._replace(run_id=first_told.get(letter.dead_letter_key, "")) for letter in letters)


def resume(
    recording: Recording,
    settled: Iterable[Settled],
    answers: Iterable[Covered],
    told: Iterable[Told],
    *,
    retry: bool = False,
) -> Recording | RecordingResult:
    """What is left to do for a recording: `skipped_done`, or the recording with what earlier runs left of it.

    It is skipped when a run has settled this very work, all rows of it are still there, and no dead letter of it may
    turn out otherwise another time. One that is not is opened again, but only what is missing is asked.

    Args:
        recording: With its `work_key`.
        settled: What earlier runs made of it. So are `answers` and `told`.
        answers: Of any model and prompt.
        told: Their dead letters.
        retry: Whether one that has dead letters is never skipped.
    """
    if not (recording.etag or recording.mtime):
        return recording  # some web servers: nobody can tell whether it is what it was
    by_key = {found.answer_key: found for found in answers}
    letters = _first_told(told)
    for row in sorted(settled, key=lambda row: row.created_at, reverse=True):
        is_there = by_key.keys() >= set(row.answer_keys) and letters.keys() >= set(row.dead_letter_keys)
        may_change = row.dead_letter_keys if retry else _RETRYABLE & set(row.reasons)
        if row.work_key == recording.work_key and is_there and not may_change:
            return skipped(recording, row)
    earlier = Earlier(tuple(by_key[key] for key in sorted(by_key)), tuple(sorted(letters.items())))
    return recording._replace(earlier=earlier)


def skipped(recording: Recording, row: Settled) -> RecordingResult:
    """The result of a recording that an earlier run has settled."""
    return RecordingResult(
        **{
            **row._asdict(),
            **own_columns(recording),
            "terminal_state": TerminalState.SKIPPED_DONE,
            "answers": 0,
            "kept_answers": len(row.answer_keys),
            "dead_letters": 0,
            "kept_dead_letters": len(row.dead_letter_keys),
        }
    )


class WorkKeys:
    """Gives recordings the key of all that is asked of them.

    Args:
        decode: How they are decoded.
        ask: What is asked of them; set up.
    """

    def __init__(self, decode: DecodeDoFn, ask: AskDoFn) -> None:
        self._policy = decode.policy
        self._ask = ask

    def add(self, recording: Recording, letters: Iterable[DeadLetter] = ()) -> Recording:
        """The recording with its `work_key`; `letters` say which mentions of it were rejected."""
        tasks = self._ask.tasks_of(recording)
        policy = *self._policy, *sorted(letter.dead_letter_key for letter in letters)
        return recording._replace(work_key=work_key(recording, tasks, *self._ask.model, policy))


class _EarlierDoFn(beam.DoFn):
    """Reads an output, in a worker that may have to be told how."""

    def __init__(self, storage_options: storage.StorageOptions) -> None:
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)


class _FilesDoFn(_EarlierDoFn):
    def __init__(self, run_id: str | None, storage_options: storage.StorageOptions) -> None:
        super().__init__(storage_options)
        self._run_id = run_id

    def process(self, output: str) -> Iterator[tuple[str, str]]:
        for table, uri in earlier_files(output):
            if self._run_id is None or not is_file_of(uri, self._run_id):
                yield table, uri


class _RowsDoFn(_EarlierDoFn):
    def process(self, file: tuple[str, str]) -> Iterator[tuple[str, Settled | Covered | Told]]:
        return read_earlier(*file)


class _ResumeDoFn(beam.DoFn):
    """Emits `Recording` to ask about, `RecordingResult` of skipped ones, and `DeadLetter`, by tag."""

    def __init__(self, decode: DecodeDoFn, ask: AskDoFn) -> None:
        self._decode = decode
        self._ask = ask

    def setup(self) -> None:
        self._ask.setup()
        self._keys = WorkKeys(self._decode, self._ask)

    def teardown(self) -> None:
        self._ask.teardown()

    def process(self, group: tuple[str, dict[str, Iterable[Any]]]) -> Iterator[Any]:
        found = group[1]
        settled, answers, told = split_earlier(found["earlier"])
        rejected = with_first_run(found["dead_letters"], told)
        for recording in found["recordings"]:
            left = resume(self._keys.add(recording, rejected), settled, answers, told)
            if isinstance(left, RecordingResult):
                metrics.count("recordings_skipped_done")
                metrics.count("recordings_done")
                yield beam.pvalue.TaggedOutput(_SKIPPED, left)
                rejected = ()  # that row names them
            else:
                yield left
        for letter in rejected:
            yield beam.pvalue.TaggedOutput(DEAD_LETTERS, letter)


class _EarlierRows:
    """What an output has when a process first asks, by recording, in a file: memory does not grow with the output."""

    def __init__(self, output: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="af3pipe-earlier-")
        self._lock = threading.Lock()
        self._rows = sqlite3.connect(Path(self._folder.name, "rows.sqlite"), check_same_thread=False)
        self._rows.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE rows (id TEXT, row BLOB);"
        )
        for table, uri in earlier_files(output):
            rows = ((recording_id, pickle.dumps(row)) for recording_id, row in read_earlier(table, uri))
            self._rows.executemany("INSERT INTO rows VALUES (?, ?)", rows)
        self._rows.execute("CREATE INDEX by_id ON rows (id)")
        self._rows.commit()

    def of(self, recording_id: str) -> list[Settled | Covered | Told]:
        with self._lock:
            found = self._rows.execute("SELECT row FROM rows WHERE id = ?", [recording_id]).fetchall()
        return [pickle.loads(row) for (row,) in found]


_earlier: dict[str, _EarlierRows] = {}
_earlier_lock = threading.Lock()


class _ResumeEachDoFn(beam.DoFn):
    """As `_ResumeDoFn`, one at a time, beside the output.

    Not by a side input: some runners hold a stream back until the next element, or for ever, where it has one.
    """

    def __init__(self, resume: _ResumeDoFn, output: str | None, storage_options: storage.StorageOptions) -> None:
        self._resume = resume
        self._output = output
        self._storage_options = storage_options
        self._stream_id = uuid.uuid4().hex  # one of several that a process may run into this output

    def setup(self) -> None:
        set_storage(self._storage_options)
        self._resume.setup()

    def teardown(self) -> None:
        self._resume.teardown()

    def process(self, item: Recording | DeadLetter) -> Iterator[Any]:
        earlier = self._earlier_of(item.recording_id)
        is_letter = isinstance(item, DeadLetter)
        if is_letter:
            earlier = _named(earlier)
        found: dict[str, Iterable[Any]] = {
            "recordings": () if is_letter else (item,),
            "dead_letters": (item,) if is_letter else (),
            "earlier": earlier,
        }
        return self._resume.process((item.recording_id, found))

    def _earlier_of(self, recording_id: str) -> list[Settled | Covered | Told]:
        if self._output is None:
            return []
        with _earlier_lock:  # read once, whichever bundle is first
            if self._stream_id not in _earlier:
                _earlier[self._stream_id] = _EarlierRows(self._output)
        return _earlier[self._stream_id].of(recording_id)


def _named(earlier: list[Settled | Covered | Told]) -> list[Settled | Covered | Told]:
    """Without dead letters that no row of `recordings/` names: what wrote them was killed before it wrote that."""
    named = {key for row in earlier if isinstance(row, Settled) for key in row.dead_letter_keys}
    return [row for row in earlier if not isinstance(row, Told) or row.dead_letter_key in named]


class ResumeOutcome(NamedTuple):
    """An `Outcome` of the recordings there is something to ask of, and the `RecordingResult` of all others."""

    good: Any
    dead_letters: Any
    skipped: Any


class ResumeRecordings(beam.PTransform):
    """Holds recordings against what an output has of earlier runs.

    Takes `Recording` (a PCollection, or the Outcome of `ReadRecordings` or `WatchRecordings`); gives a
    `ResumeOutcome`. A stream is held against what there is when each of its workers begins.

    Args:
        output: Folder with the tables of earlier runs; None where none is to be resumed.
        decode: How recordings are decoded.
        ask: What is asked.
        run_id: Of a bounded run that writes as it goes: what it has written itself is not of an earlier one, where
            its runner begins it again.
        storage_options: As of `ReadRecordings`.
    """

    def __init__(
        self,
        output: str | None,
        decode: DecodeAudio,
        ask: AskAudioFlamingo,
        *,
        run_id: str | None = None,
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self._output = output
        self._run_id = run_id
        self._storage_options = dict(storage_options)
        self._dofn = _ResumeDoFn(decode.dofn, ask.dofn)

    def expand(self, inputs: Any) -> Any:
        recordings, before = split_input(inputs)
        if recordings.is_bounded:
            letters = before[0] if before else recordings.pipeline | "NoLetters" >> beam.Create([])
            resumed = _tagged(_meet(recordings, letters, self._earlier(recordings.pipeline)), self._dofn)
        else:
            each = _ResumeEachDoFn(self._dofn, self._output, self._storage_options)
            resumed = _tagged((recordings, *before) | "RecordingsAndLetters" >> beam.Flatten(), each)
        return ResumeOutcome(resumed.recordings, resumed[DEAD_LETTERS], resumed[_SKIPPED])

    def _earlier(self, pipeline: Any) -> Any:
        files = pipeline | "Outputs" >> beam.Create([self._output] if self._output else [], reshuffle=False)
        return (
            files
            | "EarlierFiles"
            >> beam.ParDo(_FilesDoFn(self._run_id, self._storage_options)).with_output_types(tuple[str, str])
            | "SpreadFiles" >> beam.Reshuffle()
            | "ReadEarlier" >> beam.ParDo(_RowsDoFn(self._storage_options)).with_output_types(tuple[str, Any])
        )


def _meet(recordings: Any, letters: Any, earlier: Any) -> Any:
    told = {
        "recordings": recordings | "RecordingId" >> beam.Map(by_id).with_output_types(tuple[str, Recording]),
        "dead_letters": letters | "DeadLetterId" >> beam.Map(by_id).with_output_types(tuple[str, DeadLetter]),
        "earlier": earlier,
    }
    return told | "MeetById" >> beam.CoGroupByKey()


def _tagged(inputs: Any, dofn: beam.DoFn) -> Any:
    types = {DEAD_LETTERS: DeadLetter, _SKIPPED: RecordingResult}
    resume = beam.ParDo(dofn).with_output_types(Recording, **types)
    return inputs | "Resume" >> resume.with_outputs(*types, main="recordings")
