"""Reconciles a run: checks that every recording it found has a result and every counted row was written."""

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.storage.parquet import ParquetFile
from af3pipe.tables.reader import files_of_run

_BATCH_ROWS = 4096


class RunCounts(NamedTuple):
    """Counts what a run found and what it wrote.

    Attributes:
        found: Number of distinct recordings that the inputs matched.
        states: Recordings by terminal state; skipped recordings are counted here but have no row.
        answers: Rows by table.
        dead_letters: Rows by reason.
        kept_dead_letters: Dead letters of earlier runs that still apply to recordings of this run.
        audio_s: Seconds of audio covered by answers.
        problems: Sentences that say what does not reconcile; empty if everything does.
    """

    found: int
    states: dict[str, int]
    answers: dict[str, int]
    dead_letters: dict[str, int]
    kept_dead_letters: int
    audio_s: float
    problems: tuple[str, ...]

    @property
    def reconciled(self) -> bool:
        """Whether every recording found has exactly one terminal state and every counted row was written."""
        return not self.problems


def read_rows(uris: Iterable[str], columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Reads rows of Parquet files, one file in memory at a time."""
    for uri in uris:
        with storage.open_input(uri) as file:
            yield from ParquetFile(file).read(columns).to_pylist()


def count_run(output: str, run_id: str, found: int | None, skipped: int = 0, kept_dead_letters: int = 0) -> RunCounts:
    """Reads the rows that a run wrote, counts them, and compares them with the number of recordings that it found.

    The comparison uses a temporary database on disk, so memory does not grow with the run. Copies of a row, which a
    runner writes when it retries a group under another name, count as one row, as they do for readers.

    Args:
        output: Output folder of the run.
        run_id: The run.
        found: Number of recordings that the run found; None if unknown.
        skipped: How many of them were skipped because an earlier run had done them; these have no row.
        kept_dead_letters: Number of dead letters of the skipped recordings.

    Raises:
        Rejected: The output cannot be read.
    """
    files = files_of_run(output, run_id)
    with tempfile.TemporaryDirectory(prefix="af3pipe-counts-") as folder, closing(_open_db(folder)) as db:
        for columns in _columns(files["recordings"], _STATED):
            db.executemany(_ADD_RECORDING, zip(*columns, strict=True))
        for table in ANSWER_TABLES:
            for ids, keys in _columns(files[table], ["answer_key"]):
                _add_rows(db, "answers", [table] * len(ids), ids, keys)
        for ids, reasons_of_rows, keys in _columns(files["dead_letters"], ["reason", "dead_letter_key"]):
            _add_rows(db, "dead_letters", reasons_of_rows, ids, keys)
        answers, reasons = (_rows_by_name(db, what) for what in ("answers", "dead_letters"))
        states = dict(db.execute("SELECT state, count(*) FROM recordings GROUP BY state"))
        written, distinct, kept, audio_s = db.execute(
            "SELECT count(*), count(DISTINCT id), total(kept), total(covered_s * (answers > 0)) FROM recordings"
        ).fetchone()
        if skipped:
            states["skipped_done"] = states.get("skipped_done", 0) + skipped
        found_once = [
            *_differ("recordings found", found or 0, "recordings with a terminal state", written + skipped),
            *_differ("recordings with a state", written, "different ones", distinct),
        ]
        problems = [
            *([] if found is None else found_once),
            *_rows_differ("answers", db),
            *_rows_differ("dead_letters", db),
        ]
    return RunCounts(
        found=written + skipped if found is None else found,
        states=states,
        answers=answers,
        dead_letters=reasons,
        kept_dead_letters=int(kept) + kept_dead_letters,
        audio_s=audio_s,
        problems=tuple(problems),
    )


_STATED = ["work_key", "answers", "dead_letters", "terminal_state", "covered_s", "kept_dead_letters"]
_ADD_RECORDING = "INSERT OR REPLACE INTO recordings VALUES (?, ifnull(?, ''), ?, ?, ?, ?, ?)"


def _open_db(folder: str) -> sqlite3.Connection:
    """Creates the database: a row for each recording and its `work_key`; answers by table, dead letters by reason."""
    db = sqlite3.connect(Path(folder, "counts.sqlite"), isolation_level=None)
    db.executescript(
        """
        PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;
        CREATE TABLE recordings (
            id TEXT, work TEXT, answers INTEGER, dead_letters INTEGER, state TEXT, covered_s REAL, kept INTEGER,
            PRIMARY KEY (id, work)
        );
        CREATE TABLE rows (what TEXT, name TEXT, id TEXT, key TEXT, PRIMARY KEY (what, id, key));
        BEGIN;
        """
    )
    return db


def _columns(uris: Iterable[str], columns: list[str]) -> Iterator[list[list[Any]]]:
    """Reads `recording_id` and these columns in batches of a few thousand rows."""
    columns = ["recording_id", *columns]
    for uri in uris:
        with storage.open_input(uri) as file:
            for batch in ParquetFile(file).iter_batches(_BATCH_ROWS, columns=columns):
                yield [batch[name].to_pylist() for name in columns]


def _add_rows(
    db: sqlite3.Connection, what: str, names: Iterable[str], ids: Iterable[str], keys: Iterable[str]
) -> None:
    rows = zip(names, ids, keys, strict=True)
    db.executemany(f"INSERT OR IGNORE INTO rows VALUES ('{what}', ?, ?, ?)", rows)


def _rows_by_name(db: sqlite3.Connection, what: str) -> dict[str, int]:
    return dict(db.execute("SELECT name, count(*) FROM rows WHERE what = ? GROUP BY name", [what]))


def _differ(what: str, count: int, other: str, other_count: int) -> Iterator[str]:
    if count != other_count:
        yield f"{count} {what}, but {other_count} {other}"


def _rows_differ(what: str, db: sqlite3.Connection) -> Iterator[str]:
    """Yields a sentence if some recordings have another number of rows than their row in `recordings/` says."""
    differing = f"""
        SELECT id FROM (
            SELECT id, {what} AS stated, 0 AS written FROM recordings
            UNION ALL SELECT id, 0, 1 FROM rows WHERE what = '{what}'
        ) GROUP BY id HAVING sum(stated) != sum(written)
    """
    wrong, example = db.execute(f"SELECT count(*), min(id) FROM ({differing})").fetchone()
    if wrong:
        stated, written = db.execute(
            f"SELECT (SELECT sum({what}) FROM recordings), (SELECT count(*) FROM rows WHERE what = '{what}')"
        ).fetchone()
        yield (
            f"{stated or 0} {what.replace('_', ' ')} expected, {written} rows written; "
            f"{wrong} recordings differ, for example {example}"
        )
