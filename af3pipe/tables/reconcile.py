"""Reconciles a run: compares the rows that it wrote with the recordings that it found."""

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
    """What a run found and what it wrote.

    Attributes:
        found: Recordings matched, each once.
        states: Recordings by terminal state; those that were skipped have no row.
        answers: Rows by table.
        dead_letters: Rows by reason.
        kept_dead_letters: Those of earlier runs that are still true of its recordings.
        audio_s: Seconds of audio covered by answers, of recordings of which something was answered.
        problems: What does not reconcile, in sentences; empty when all does.
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
        """Whether every recording found ended in one terminal state and every row is where it should be."""
        return not self.problems


def read_rows(uris: Iterable[str], columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Reads rows of Parquet files, one file in memory at a time."""
    for uri in uris:
        with storage.open_input(uri) as file:
            yield from ParquetFile(file).read(columns).to_pylist()


def count_run(output: str, run_id: str, found: int | None, skipped: int = 0, kept_dead_letters: int = 0) -> RunCounts:
    """Reads back what a run wrote and compares it with the number of recordings that it found.

    What is compared is kept on disk: memory does not grow with the run. A row that is there twice, because a runner
    wrote its group again under another name, is one row, as it is to those who read.

    Args:
        output: Of the run.
        run_id: Of the run.
        found: How many; None where nobody has counted them.
        skipped: How many of these an earlier run had done, so that they have no row.
        kept_dead_letters: How many dead letters the skipped ones have.

    Raises:
        Rejected: The output cannot be read.
    """
    files = files_of_run(output, run_id)
    with tempfile.TemporaryDirectory(prefix="af3pipe-books-") as folder, closing(_open_books(folder)) as books:
        for columns in _columns(files["recordings"], _STATED):
            books.executemany(_ADD_RECORDING, zip(*columns, strict=True))
        for table in ANSWER_TABLES:
            for ids, keys in _columns(files[table], ["answer_key"]):
                _add_rows(books, "answers", [table] * len(ids), ids, keys)
        for ids, told, keys in _columns(files["dead_letters"], ["reason", "dead_letter_key"]):
            _add_rows(books, "dead_letters", told, ids, keys)
        answers, reasons = (_rows_by_name(books, what) for what in ("answers", "dead_letters"))
        states = dict(books.execute("SELECT state, count(*) FROM recordings GROUP BY state"))
        written, distinct, kept, audio_s = books.execute(
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
            *_rows_differ("answers", books),
            *_rows_differ("dead_letters", books),
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


def _open_books(folder: str) -> sqlite3.Connection:
    """A recording counts once for all that was asked of it; `rows` are by their table or reason."""
    books = sqlite3.connect(Path(folder, "books.sqlite"), isolation_level=None)
    books.executescript(
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
    return books


def _columns(uris: Iterable[str], columns: list[str]) -> Iterator[list[list[Any]]]:
    """`recording_id` and these columns, some thousand rows at a time."""
    columns = ["recording_id", *columns]
    for uri in uris:
        with storage.open_input(uri) as file:
            for batch in ParquetFile(file).iter_batches(_BATCH_ROWS, columns=columns):
                yield [batch[name].to_pylist() for name in columns]


def _add_rows(
    books: sqlite3.Connection, what: str, names: Iterable[str], ids: Iterable[str], keys: Iterable[str]
) -> None:
    rows = zip(names, ids, keys, strict=True)
    books.executemany(f"INSERT OR IGNORE INTO rows VALUES ('{what}', ?, ?, ?)", rows)


def _rows_by_name(books: sqlite3.Connection, what: str) -> dict[str, int]:
    return dict(books.execute("SELECT name, count(*) FROM rows WHERE what = ? GROUP BY name", [what]))


def _differ(what: str, count: int, other: str, other_count: int) -> Iterator[str]:
    if count != other_count:
        yield f"{count} {what}, but {other_count} {other}"


def _rows_differ(what: str, books: sqlite3.Connection) -> Iterator[str]:
    """Where the rows of a recording are not as many as its own row says."""
    differing = f"""
        SELECT id FROM (
            SELECT id, {what} AS stated, 0 AS written FROM recordings
            UNION ALL SELECT id, 0, 1 FROM rows WHERE what = '{what}'
        ) GROUP BY id HAVING sum(stated) != sum(written)
    """
    wrong, example = books.execute(f"SELECT count(*), min(id) FROM ({differing})").fetchone()
    if wrong:
        stated, written = books.execute(
            f"SELECT (SELECT sum({what}) FROM recordings), (SELECT count(*) FROM rows WHERE what = '{what}')"
        ).fetchone()
        yield (
            f"{stated or 0} {what.replace('_', ' ')} expected, {written} rows written; "
            f"{wrong} recordings differ, for example {example}"
        )
