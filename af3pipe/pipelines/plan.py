"""Plans a run on disk, without Beam: groups recordings by object and leaves out what earlier runs have done.

Beam's in-process runner keeps the output of every stage in memory and writes nothing before all of it is processed.
The plan is a SQLite database, so memory does not grow with the archive; it is processed in chunks, and each chunk is
written before the next one begins.
"""

import itertools
import json
import logging
import pickle
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from af3pipe.schemas import AudioObject, DeadLetter, Recording, RecordingResult, Rejected
from af3pipe.storage import ObjectInfo
from af3pipe.tables.existing import ExistingRecording, ExistingRow, ExistingRows, existing_rows
from af3pipe.tables.keys import KeySet, Mask, hashes_of
from af3pipe.tables.layout import partition_folder
from af3pipe.transforms.inputs.identity import check_id, has_own_id
from af3pipe.transforms.outcome import public_uri
from af3pipe.transforms.plan import STAT_THREADS, WorkKeys, plan_object, stat_object

MOST_PARTITIONS = 1000
_BATCH = 1000
_log = logging.getLogger(__name__)
_HASHED_AT_ONCE = 100_000


class Plan:
    """Plans a run in a temporary database, which is deleted when the context is closed.

    Args:
        partition_by: Partitions of the run; many partitions cause a warning.

    Attributes:
        found: Number of distinct recordings, including rejected ones; known after `make`, as the next ones are.
        skipped: Number of recordings that an earlier run has done.
        kept_dead_letters: Number of dead letters of the skipped recordings.
        to_do: Number of recordings in the chunks.
    """

    def __init__(self, partition_by: Sequence[str] = ()) -> None:
        self._partition_by = [name for name in partition_by if name not in ("date", "run")]
        self._partitions: set[str] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="af3pipe-plan-")
        self._db = sqlite3.connect(Path(self._folder.name, "plan.sqlite"), isolation_level=None)
        self._db.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE own (number INTEGER, id TEXT, uri TEXT, item BLOB);
            CREATE TABLE mention (number INTEGER, uri TEXT, id TEXT, item BLOB);
            CREATE TABLE existing (uri TEXT, id TEXT, row BLOB);
            CREATE TABLE work (number INTEGER PRIMARY KEY, recordings INTEGER, item BLOB);
            """
        )
        self._numbers = itertools.count()
        self._results: list[RecordingResult] = []
        self.found = 0
        self.skipped = 0
        self.kept_dead_letters = 0
        self.to_do = 0

    def __enter__(self) -> "Plan":
        return self

    def __exit__(
        self, error_class: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._folder.cleanup()

    def add_found(self, items: Iterable[Recording | DeadLetter | RecordingResult]) -> None:
        """Adds listed items, in any order and with repeats; results are written verbatim."""
        with self._transaction():
            for item in items:
                number = next(self._numbers)
                if isinstance(item, RecordingResult):
                    self._results.append(item)
                elif isinstance(item, Recording) and has_own_id(item):
                    row = number, item.recording_id, public_uri(item), pickle.dumps(item)
                    self._db.execute("INSERT INTO own VALUES (?, ?, ?, ?)", row)
                else:
                    self._mention(number, item)

    def _mention(self, number: int, item: Recording | DeadLetter) -> None:
        uri = public_uri(item) if isinstance(item, Recording) else item.uri
        row = number, uri, item.recording_id, pickle.dumps(item)
        self._db.execute("INSERT INTO mention VALUES (?, ?, ?, ?)", row)

    def add_existing(self, output: str) -> None:
        """Adds the rows that earlier runs wrote about the found objects and ids.

        Raises:
            Rejected, StorageError: The output cannot be listed, or one of its files cannot be used.
        """
        objects = self._keys("SELECT uri FROM mention UNION SELECT uri FROM own")
        ids = self._keys("SELECT DISTINCT id FROM own")

        def wanted(rows: pa.Table) -> Mask:
            of_object = objects.has(hashes_of(rows["uri"]))
            return of_object | ids.has(hashes_of(rows["recording_id"])) if ids.size else of_object

        self._add_rows(existing_rows(output, wanted))

    def _keys(self, query: str) -> KeySet:
        """Returns the hashes of the distinct texts of a query; the texts themselves would take more memory."""
        rows = self._db.execute(query)
        hashes = [np.zeros((0, 2), np.uint64)]
        while texts := [text for (text,) in itertools.islice(rows, _HASHED_AT_ONCE)]:
            hashes.append(hashes_of(pa.chunked_array([pa.array(texts, pa.string())])))
        return KeySet(np.concatenate(hashes))

    def _add_rows(self, rows: Iterable[ExistingRow]) -> None:
        with self._transaction():
            self._db.executemany(
                "INSERT INTO existing VALUES (?, ?, ?)",
                (
                    (row.uri, row.recording_id if isinstance(row, ExistingRecording) else None, pickle.dumps(row))
                    for row in rows
                ),
            )

    def make(self, keys: WorkKeys, *, retry: bool = False) -> Iterator[RecordingResult]:
        """Decides for each object what to do; yields results that need no processing.

        Args:
            keys: Computes the `work_key` of recordings for the job.
            retry: Whether a recording with dead letters always counts as not done.
        """
        self._db.execute("CREATE INDEX own_id ON own (id, number)")
        self._db.execute("CREATE INDEX existing_id ON existing (id)")
        self._check_ids()
        self._db.execute("CREATE INDEX mention_uri ON mention (uri, number)")
        self._db.execute("CREATE INDEX existing_uri ON existing (uri)")
        self.found += len(self._results)
        yield from self._results
        with ThreadPoolExecutor(STAT_THREADS, thread_name_prefix="af3pipe-stat") as pool:
            objects = self._objects()
            while batch := list(itertools.islice(objects, _BATCH)):
                stated = pool.map(_stat, (mentions for _, mentions, _ in batch))
                with self._transaction():
                    for (uri, mentions, letters), info in zip(batch, stated, strict=True):
                        existing = ExistingRows(self._existing("uri", uri))
                        planned = plan_object(uri, mentions, letters, info, existing, keys, retry=retry)
                        self.found += len(planned.found)
                        self.skipped += len(planned.skipped)
                        self.kept_dead_letters += len(planned.kept_dead_letters)
                        if planned.work is not None:
                            self._count_partitions(planned.work)
                            number = len(planned.found) - len(planned.skipped)
                            self.to_do += number
                            row = number, pickle.dumps(planned.work)
                            self._db.execute("INSERT INTO work (recordings, item) VALUES (?, ?)", row)

    def _check_ids(self) -> None:
        """Checks ids that manifests gave; recordings whose id belongs to another recording become dead letters."""
        rows = self._db.execute("SELECT id, number, item FROM own ORDER BY id, number")
        # Only an id that looks like a source_key can be that of audio without an id.
        like_source_key = "SELECT id FROM own WHERE length(id) = 20 AND id NOT GLOB '*[^0-9a-f]*'"
        unnamed: dict[str, Recording] = {}
        if self._db.execute(f"{like_source_key} LIMIT 1").fetchone():
            for own_id, item in self._db.execute(f"SELECT id, item FROM mention WHERE id IN ({like_source_key})"):
                found = pickle.loads(item)
                if isinstance(found, Recording):
                    unnamed[own_id] = found
        with self._transaction():
            for own_id, group in itertools.groupby(rows, key=lambda row: row[0]):
                mentions = [(number, pickle.loads(item)) for _, number, item in group]
                existing = [row for row in self._existing("id", own_id) if isinstance(row, ExistingRecording)]
                others = [unnamed[own_id]] if own_id in unnamed else []
                for item in check_id([*(item for _, item in mentions), *others], existing):
                    if item not in others:
                        self._mention(mentions[0][0], item)

    def chunks(self, size: int) -> Iterator[list[AudioObject]]:
        """Yields the objects to process in chunks, in the order in which they were found.

        Args:
            size: Least number of recordings of a chunk, except the last one.
        """
        chunk: list[AudioObject] = []
        recordings = 0
        for number, item in self._db.execute("SELECT recordings, item FROM work ORDER BY number"):
            chunk.append(pickle.loads(item))
            recordings += number
            if recordings >= size:
                yield chunk
                chunk, recordings = [], 0
        if chunk:
            yield chunk

    def _count_partitions(self, work: AudioObject) -> None:
        """Warns, before any processing, if the tables would get more partition folders than readers handle well."""
        if not self._partition_by or len(self._partitions) > MOST_PARTITIONS:
            return
        folders = (partition_folder(self._partition_by, "", json.loads(row.metadata)) for row in work.recordings)
        self._partitions.update(folders)
        if len(self._partitions) > MOST_PARTITIONS:
            _log.warning(
                "partition_by %s makes more than %d folders in each table, each with its own files, so that readers "
                "will be slow; choose a column with fewer values",
                ", ".join(self._partition_by),
                MOST_PARTITIONS,
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def _objects(self) -> Iterator[tuple[str, list[Recording], list[DeadLetter]]]:
        """Yields each object with its recordings and dead letters, in the order in which objects were first found."""
        rows = self._db.execute(
            """
            SELECT mention.uri, item
            FROM mention JOIN (SELECT uri, min(number) AS first FROM mention GROUP BY uri) USING (uri)
            ORDER BY first, mention.uri, number
            """
        )
        for uri, group in itertools.groupby(rows, key=lambda row: row[0]):
            items = [pickle.loads(item) for _, item in group]
            yield (
                uri,
                [item for item in items if isinstance(item, Recording)],
                [item for item in items if isinstance(item, DeadLetter)],
            )

    def _existing(self, column: str, value: str) -> list[ExistingRow]:
        rows = self._db.execute(f"SELECT row FROM existing WHERE {column} = ?", (value,))
        return [pickle.loads(row) for (row,) in rows]


def _stat(mentions: list[Recording]) -> ObjectInfo | Rejected | None:
    return stat_object(mentions) if mentions else None
