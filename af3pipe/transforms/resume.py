"""Reads what earlier runs wrote into the output, so that batch and streaming pipelines can skip it."""

import pickle
import sqlite3
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam

from af3pipe import storage
from af3pipe.schemas import AudioObject, DeadLetter, Recording
from af3pipe.storage import ObjectInfo
from af3pipe.tables.existing import (
    ExistingLetter,
    ExistingRecording,
    ExistingRow,
    ExistingRows,
    existing_rows,
    read_existing,
)
from af3pipe.tables.reader import possible_runs, table_files
from af3pipe.transforms import metrics
from af3pipe.transforms.ask import Asker
from af3pipe.transforms.decode import Decoder
from af3pipe.transforms.inputs.identity import check_id, has_own_id
from af3pipe.transforms.launcher import SentByLauncher
from af3pipe.transforms.outcome import public_uri
from af3pipe.transforms.plan import SKIPPED, WorkKeys, plan_object, stat_object
from af3pipe.transforms.stores import set_storage

_File = tuple[str, ObjectInfo]


class _FilesDoFn(beam.DoFn):
    """Maps the URI of an output to (table, file) for each file that other runs wrote."""

    def __init__(self, run_id: str, storage_options: storage.StorageOptions) -> None:
        self._run_id = run_id
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)

    def process(self, output: str) -> Iterator[_File]:
        for table, infos in table_files(output).items():
            for info in infos:
                if self._run_id not in possible_runs(info.uri):
                    yield table, info


class _RowsDoFn(beam.DoFn):
    """Maps (table, file) to the rows of the file."""

    def __init__(self, output: str, storage_options: storage.StorageOptions) -> None:
        self._output = output
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)

    def process(self, file: _File) -> Iterator[ExistingRow]:
        return read_existing(self._output, *file)


class ReadExisting(beam.PTransform):
    """Reads the rows that earlier runs wrote: `ExistingRecording`, `ExistingAnswer` and `ExistingLetter`.

    Args:
        output: Folder with the tables.
        run_id: The current run, whose own files (written before its runner restarted it) are skipped.
        storage_options: See `ReadRecordings`.
    """

    def __init__(self, output: str, run_id: str, storage_options: storage.StorageOptions) -> None:
        super().__init__()
        self._output = output
        self._files = _FilesDoFn(run_id, storage_options)
        self._rows = _RowsDoFn(output, storage_options)

    def expand(self, pipeline: Any) -> Any:
        return (
            pipeline
            | "Output" >> beam.Create([self._output], reshuffle=False)
            | "Files" >> beam.ParDo(self._files).with_output_types(tuple[str, Any])
            | "SpreadFiles" >> beam.Reshuffle()
            | "Rows" >> beam.ParDo(self._rows).with_output_types(Any)
        )


class _ExistingIndex:
    """Indexes an output's rows by object and by id in a temporary SQLite database, so memory is bounded."""

    def __init__(self, output: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="af3pipe-existing-")
        self._lock = threading.Lock()
        self._rows = sqlite3.connect(Path(self._folder.name, "rows.sqlite"), check_same_thread=False)
        self._rows.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE rows (uri TEXT, id TEXT, row BLOB);"
        )
        self._rows.executemany(
            "INSERT INTO rows VALUES (?, ?, ?)",
            (
                (row.uri, row.recording_id if isinstance(row, ExistingRecording) else None, pickle.dumps(row))
                for row in existing_rows(output)
            ),
        )
        self._rows.execute("CREATE INDEX by_uri ON rows (uri)")
        self._rows.execute("CREATE INDEX by_id ON rows (id)")
        self._rows.commit()

    def of(self, column: str, value: str) -> list[ExistingRow]:
        with self._lock:
            found = self._rows.execute(f"SELECT row FROM rows WHERE {column} = ?", [value]).fetchall()
        return [pickle.loads(row) for (row,) in found]


_indexes: dict[str, _ExistingIndex] = {}
_indexes_lock = threading.Lock()


class _PlanEachDoFn(SentByLauncher, beam.DoFn):
    """Maps `Recording` or `DeadLetter` of a stream to `AudioObject`; emits skipped recordings to a tag.

    It has no side input, because with one, some runners delay a stream until the next element, or for ever.
    """

    def __init__(
        self, output: str | None, decoder: Decoder, asker: Asker, storage_options: storage.StorageOptions
    ) -> None:
        self._output = output
        self._decoder = decoder
        self._asker = asker
        self._storage_options = storage_options
        self._stream_id = uuid.uuid4().hex  # a process may run several streams into this output

    def setup(self) -> None:
        set_storage(self._storage_options)
        self._asker.setup()
        self._keys = WorkKeys(self._decoder, self._asker)

    def process(self, item: Recording | DeadLetter) -> Iterator[Any]:
        metrics.count("recordings_found")
        if isinstance(item, Recording) and has_own_id(item):
            rows = self._existing("id", item.recording_id)
            (item,) = check_id([item], [row for row in rows if isinstance(row, ExistingRecording)])
        mentions = [item] if isinstance(item, Recording) else []
        letters = [] if isinstance(item, Recording) else [item]
        uri = public_uri(item) if isinstance(item, Recording) else item.uri
        existing = ExistingRows(_named(self._existing("uri", uri)))
        stated = stat_object(mentions) if mentions else None
        planned = plan_object(uri, mentions, letters, stated, existing, self._keys)
        metrics.count("recordings_skipped_done", len(planned.skipped))
        metrics.count("recordings_done", len(planned.skipped))
        yield from (beam.pvalue.TaggedOutput(SKIPPED, one) for one in planned.skipped)
        if planned.work is not None:
            yield planned.work

    def _existing(self, column: str, value: str) -> list[ExistingRow]:
        if self._output is None:
            return []
        with _indexes_lock:  # read once, whichever bundle is first
            if self._stream_id not in _indexes:
                _indexes[self._stream_id] = _ExistingIndex(self._output)
        return _indexes[self._stream_id].of(column, value)


def _named(rows: list[ExistingRow]) -> list[ExistingRow]:
    """Drops dead letters that no row of `recordings/` references: their run was killed before it wrote that row."""
    named = {key for row in rows if isinstance(row, ExistingRecording) for key in row.dead_letter_keys}
    return [row for row in rows if not isinstance(row, ExistingLetter) or row.dead_letter_key in named]


class PlannedStream(NamedTuple):
    """Has the `AudioObject`s of a stream, and (recording_id, content identity) of each skipped recording."""

    objects: Any
    skipped: Any


class PlanStream(beam.PTransform):
    """Makes an `AudioObject` of each recording of a stream, and skips what earlier runs have done.

    The input is an `Outcome` of `Recording`; the output is a `PlannedStream`. Each recording is compared with the
    rows that the output had when the worker process first read it.

    Args:
        output: Folder with the tables; None for a run that does not resume.
        decoder: Has the decoding settings.
        asker: Has the tasks and the model.
        storage_options: See `ReadRecordings`.
    """

    def __init__(
        self, output: str | None, decoder: Decoder, asker: Asker, storage_options: storage.StorageOptions
    ) -> None:
        super().__init__()
        self._dofn = _PlanEachDoFn(output, decoder, asker, dict(storage_options))

    def expand(self, found: Any) -> Any:
        plan = beam.ParDo(self._dofn).with_output_types(AudioObject, **{SKIPPED: tuple[str, str]})
        planned = (
            (found.good, found.dead_letters)
            | "RecordingsAndLetters" >> beam.Flatten()
            | "Plan" >> plan.with_outputs(SKIPPED, main="objects")
        )
        return PlannedStream(planned.objects, planned[SKIPPED])
