"""Skips recordings that the current run has written already, when a runner restarts bundles of a lost worker."""

import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import apache_beam as beam

from af3pipe import storage
from af3pipe.schemas import AudioObject, DeadLetter, Recording, RecordingResult
from af3pipe.tables.layout import day_of
from af3pipe.tables.reader import read_file, run_files, run_prefix
from af3pipe.transforms import metrics
from af3pipe.transforms.stores import set_storage


class _Written:
    """Keeps the ids of the recordings that a run has written in a temporary SQLite database, so memory is bounded."""

    def __init__(self, output: str, run_id: str, prefix: str) -> None:
        self._output = output
        self._run_id = run_id
        self._prefix = prefix
        self._folder = tempfile.TemporaryDirectory(prefix="af3pipe-written-")
        self._lock = threading.Lock()
        self._read: set[str] = set()
        self._ids = sqlite3.connect(Path(self._folder.name, "ids.sqlite"), check_same_thread=False)
        self._ids.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID;"
        )

    def refresh(self) -> None:
        """Reads the ids from files that are new since the last call.

        Raises:
            StorageError, Rejected: The files cannot be listed or read.
        """
        with self._lock:
            for info in run_files(self._output, "recordings", self._run_id, self._prefix):
                if info.uri not in self._read:
                    for rows in read_file(self._output, "recordings", info, ["recording_id"]):
                        ids = rows["recording_id"].to_pylist()
                        self._ids.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((one,) for one in ids))
                    self._read.add(info.uri)

    def ids(self) -> list[str]:
        """Returns all ids."""
        with self._lock:
            return [one for (one,) in self._ids.execute("SELECT id FROM ids")]

    def __contains__(self, recording_id: str) -> bool:
        with self._lock:
            return bool(self._ids.execute("SELECT 1 FROM ids WHERE id = ?", [recording_id]).fetchone())


_Where = tuple[str, str, str]  # output, run_id, and the prefix of the names of the run's files
_written: dict[_Where, _Written] = {}
_written_lock = threading.Lock()


def _written_by(where: _Where) -> _Written:
    """Returns the process's ids for this run, refreshed."""
    with _written_lock:
        if where not in _written:
            _written[where] = _Written(*where)
    found = _written[where]
    found.refresh()
    return found


class _WrittenDoFn(beam.DoFn):
    def __init__(
        self, output: str, run_id: str, partition_by: Sequence[str], storage_options: storage.StorageOptions
    ) -> None:
        # With the day, if the run id begins with one, a store lists no files of other runs.
        self._where = output, run_id, run_prefix(run_id, partition_by, day_of(run_id))
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)


class _NotWrittenDoFn(_WrittenDoFn):
    """Refreshes the ids once per bundle, since runners restart whole bundles."""

    def start_bundle(self) -> None:
        self._run = _written_by(self._where)

    def process(self, found: AudioObject) -> Iterator[AudioObject]:
        recordings = tuple(one for one in found.recordings if one.recording_id not in self._run)
        letters = tuple(one for one in found.dead_letters if one.recording_id not in self._run)
        ready = tuple(one for one in found.ready if one.row.recording_id not in self._run)
        ids = _ids(found.recordings, found.dead_letters, found.ready)
        remaining = _ids(recordings, letters, ready)
        metrics.count("recordings_done", len(ids) - len(remaining))
        if remaining:
            yield found._replace(recordings=recordings, dead_letters=letters, ready=ready)


def _ids(
    recordings: Iterable[Recording], letters: Iterable[DeadLetter], ready: Iterable[RecordingResult]
) -> set[str]:
    ids = {one.recording_id for one in recordings} | {one.recording_id for one in letters}
    return ids | {one.row.recording_id for one in ready}


class NotWritten(beam.PTransform):
    """Removes recordings from `AudioObject`s if the current run already has a row for them in `recordings/`.

    It is for bounded runs that write as they go: what a worker wrote before it was lost is not processed again.

    Args:
        output: Output folder of the run.
        run_id: The run.
        partition_by: Partitions of the run.
        storage_options: See `ReadRecordings`.
        accelerator: Resource hint of the next transform, so that the two are fused into one stage.
    """

    def __init__(
        self,
        output: str,
        run_id: str,
        *,
        partition_by: Sequence[str] = (),
        storage_options: storage.StorageOptions = MappingProxyType({}),
        accelerator: str | None = None,
    ) -> None:
        super().__init__()
        self._dofn = _NotWrittenDoFn(output, run_id, partition_by, dict(storage_options))
        if accelerator:
            self.with_resource_hints(accelerator=accelerator)

    def expand(self, objects: Any) -> Any:
        return objects | "NotWritten" >> beam.ParDo(self._dofn).with_output_types(AudioObject)


class _ReadWrittenDoFn(_WrittenDoFn):
    def process(self, _: Any) -> list[str]:
        return _written_by(self._where).ids()


class ReadWritten(beam.PTransform):
    """Reads the ids of recordings that the current run wrote before its runner restarted it.

    Args:
        output: Output folder of the run.
        run_id: The run.
        partition_by: Partitions of the run.
        storage_options: See `ReadRecordings`.
    """

    def __init__(
        self,
        output: str,
        run_id: str,
        *,
        partition_by: Sequence[str] = (),
        storage_options: storage.StorageOptions = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self._dofn = _ReadWrittenDoFn(output, run_id, partition_by, dict(storage_options))

    def expand(self, pipeline: Any) -> Any:
        return pipeline | beam.Impulse() | "ReadWritten" >> beam.ParDo(self._dofn).with_output_types(str)
