"""What a run in this process has to do, on disk: found, each once, and held against what earlier runs have done.

Beam's in-process runner keeps every stage's output in memory, and writes nothing before all is asked. So what it is
given is planned here, in memory that does not grow with the archive, and handed out in chunks, each of which lands
when it is done.
"""

import itertools
import pickle
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from af3pipe import storage
from af3pipe.schemas import Covered, DeadLetter, Reason, Recording, RecordingResult, Rejected
from af3pipe.transforms.inputs.read import STAT_THREADS, merge, stat_recording
from af3pipe.transforms.reconcile import failed_by, settle_rejected
from af3pipe.transforms.resume import (
    Settled,
    Told,
    WorkKeys,
    earlier_files,
    read_earlier,
    resume,
    split_earlier,
    with_first_run,
)
from af3pipe.transforms.settle import PlannedRecording

_BATCH = 1000
_TRIES = 3


class Settlement(NamedTuple):
    """A recording that there is nothing to ask of: how it ended, and the dead letters that say why."""

    result: RecordingResult
    dead_letters: tuple[DeadLetter, ...]


class Plan:
    """Use as a context: what it holds is on disk until it is closed.

    Attributes:
        found: Recordings, each once, rejected ones too; known once it is settled.
        to_ask: How many of them there is something to ask of.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="af3pipe-plan-")
        self._db = sqlite3.connect(Path(self._folder.name, "plan.sqlite"), isolation_level=None)
        self._db.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE mention (number INTEGER PRIMARY KEY, id TEXT, item BLOB);
            CREATE TABLE earlier (id TEXT, row BLOB);
            CREATE TABLE left (number INTEGER PRIMARY KEY, item BLOB);
            """
        )
        self.found = 0
        self.to_ask = 0

    def __enter__(self) -> "Plan":
        return self

    def __exit__(
        self, error_class: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._folder.cleanup()

    def add_found(self, items: Iterable[Recording | DeadLetter | RecordingResult]) -> None:
        """Takes what a listing gives, in any order, as often as it is given."""
        rows = ((item.recording_id, pickle.dumps(item)) for item in items)
        self._insert("INSERT INTO mention (id, item) VALUES (?, ?)", rows)

    def add_earlier(self, output: str) -> None:
        """Takes what earlier runs left in an output.

        Raises:
            Rejected, StorageError: It cannot be listed; one of its files cannot be used.
        """
        done: set[tuple[str, str]] = set()
        for tries_left in reversed(range(_TRIES)):
            try:
                for table, uri in earlier_files(output):
                    if (table, uri) not in done:
                        rows = ((found_id, pickle.dumps(row)) for found_id, row in read_earlier(table, uri))
                        self._insert("INSERT INTO earlier VALUES (?, ?)", rows)
                        done.add((table, uri))
                return
            except storage.StorageError as error:
                # A compaction at work: the rows are in another file by now. What is read twice is no harm.
                is_gone = isinstance(error.__cause__, Rejected) and error.__cause__.reason is Reason.NOT_FOUND
                if not is_gone or not tries_left:
                    raise

    def settle(self, keys: WorkKeys, *, retry: bool = False) -> Iterator[Settlement]:
        """Decides of each recording whether there is something to ask; gives those of which there is not.

        Args:
            keys: Of the job.
            retry: As of `resume`.
        """
        self._db.execute("CREATE INDEX mention_id ON mention (id, number)")
        self._db.execute("CREATE INDEX earlier_id ON earlier (id)")
        with ThreadPoolExecutor(STAT_THREADS, thread_name_prefix="af3pipe-stat") as pool:
            groups = self._groups()
            while batch := list(itertools.islice(groups, _BATCH)):
                recordings = [found for group in batch for found in group if isinstance(found, Recording)]
                stated = dict(zip(recordings, pool.map(stat_recording, recordings), strict=True))
                left: list[PlannedRecording] = []
                for group in batch:
                    items = [stated[item] if isinstance(item, Recording) else item for item in group]
                    for found_id in dict.fromkeys(item.recording_id for item in items):
                        self.found += 1
                        own = [item for item in items if item.recording_id == found_id]
                        outcome = self._outcome(own, keys, retry=retry)
                        if isinstance(outcome, Settlement):
                            yield outcome
                        else:
                            left.append(outcome)
                            self.to_ask += 1
                self._insert("INSERT INTO left (item) VALUES (?)", ((pickle.dumps(planned),) for planned in left))

    def chunks(self, size: int) -> Iterator[list[PlannedRecording]]:
        """What there is to ask, so many recordings at a time, in the order in which they were found."""
        rows = self._db.execute("SELECT item FROM left ORDER BY number")
        while chunk := [pickle.loads(item) for (item,) in itertools.islice(rows, size)]:
            yield chunk

    def _insert(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self._db.execute("BEGIN")
        try:
            self._db.executemany(statement, rows)
        finally:
            self._db.execute("COMMIT")

    def _groups(self) -> Iterator[list[Recording | DeadLetter | RecordingResult]]:
        """All that was found of an id, merged, in the order in which ids were first found."""
        rows = self._db.execute(
            """
            SELECT mention.id, item
            FROM mention JOIN (SELECT id, min(number) AS first FROM mention GROUP BY id) USING (id)
            ORDER BY first, number
            """
        )
        for _, mentions in itertools.groupby(rows, key=lambda row: row[0]):
            items = [pickle.loads(item) for _, item in mentions]
            recordings = [item for item in items if isinstance(item, Recording)]
            letters = {item.dead_letter_key: item for item in items if isinstance(item, DeadLetter)}
            results = [item for item in items if isinstance(item, RecordingResult)][:1]
            merged: list[Recording | DeadLetter] = [*(merge(recordings) if recordings else ()), *letters.values()]
            yield [*merged] or [*results]

    def _outcome(
        self, items: list[Recording | DeadLetter | RecordingResult], keys: WorkKeys, *, retry: bool
    ) -> Settlement | PlannedRecording:
        """Of one recording."""
        if isinstance(items[0], RecordingResult):
            return Settlement(items[0], ())
        settled, answers, told = split_earlier(self._earlier(items[0].recording_id))
        letters = with_first_run((item for item in items if isinstance(item, DeadLetter)), told)
        recordings = [item for item in items if isinstance(item, Recording)]
        if not recordings:
            result = settle_rejected(items[0].recording_id, [failed_by(letter) for letter in letters])
            return Settlement(result, letters)
        left = resume(keys.add(recordings[0], letters), settled, answers, told, retry=retry)
        return Settlement(left, ()) if isinstance(left, RecordingResult) else PlannedRecording(left, letters)

    def _earlier(self, found_id: str) -> list[Settled | Covered | Told]:
        return [pickle.loads(row) for (row,) in self._db.execute("SELECT row FROM earlier WHERE id = ?", (found_id,))]
