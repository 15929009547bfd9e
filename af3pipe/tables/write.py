"""Writes rows to few Parquet files, atomically; their names hash the rows' keys, so that a retry overwrites them."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from io import BytesIO
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from af3pipe import storage
from af3pipe.models.tasks import table_of
from af3pipe.schemas import (
    ANSWER_SCHEMA,
    DEAD_LETTER_SCHEMA,
    RECORDING_SCHEMA,
    Answer,
    DeadLetter,
    RecordingResult,
    RecordingRow,
)
from af3pipe.tables.formats import with_format
from af3pipe.tables.layout import TABLE_SCHEMAS, partition_folder

ROWS_PER_FILE = 50_000
_WRITERS = 8


class RowFormat(NamedTuple):
    """Says how rows of one type are written.

    Attributes:
        row_class: The NamedTuple.
        schema: Its Arrow schema.
        table: Returns the table of a row.
        key: Returns the key of a row; rows with the same key are copies.
    """

    row_class: type
    schema: pa.Schema
    table: Callable[[Any], str]
    key: Callable[[Any], str]


def _answer_table(row: Answer) -> str:
    return table_of(row.task)


def _answer_key(row: Answer) -> str:
    return f"{row.recording_id}/{row.answer_key}"


def _dead_letter_table(_: DeadLetter) -> str:
    return "dead_letters"


def _dead_letter_key(row: DeadLetter) -> str:
    return row.dead_letter_key


def _recording_table(_: RecordingRow) -> str:
    return "recordings"


def _recording_key(row: RecordingRow) -> str:
    return f"{row.recording_id}/{row.work_key or ''}"


ANSWERS = RowFormat(Answer, ANSWER_SCHEMA, _answer_table, _answer_key)
DEAD_LETTER_ROWS = RowFormat(DeadLetter, DEAD_LETTER_SCHEMA, _dead_letter_table, _dead_letter_key)
RECORDINGS = RowFormat(RecordingRow, RECORDING_SCHEMA, _recording_table, _recording_key)


def to_table(rows: Iterable[Any], schema: pa.Schema) -> pa.Table:
    """Converts rows of one NamedTuple class to an Arrow table.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowTypeError: A value does not fit its column.
    """
    return pa.Table.from_pylist([_columns(row) for row in rows], schema=with_format(schema))


def _columns(row: Any) -> dict[str, Any]:
    found: dict[str, Any] = row._asdict()
    if "segments" in found:
        found["segments"] = [piece._asdict() for piece in found["segments"]]
    if found.get("mtime") is not None:
        found["mtime"] = datetime.fromisoformat(found["mtime"])
    return found


def write_rows(
    rows: Iterable[Any], row_format: RowFormat, output: str, folder: str, run_id: str, *, pane: str = ""
) -> Iterator[str]:
    """Writes rows to Parquet files in one folder and yields their URIs; the same rows give the same file names.

    Args:
        rows: Rows of one type.
        row_format: How rows of this type are written.
        output: Folder of all tables.
        folder: Folder below `output`: the table, and its partition folders if there are any.
        run_id: Written to the rows and part of the file names.
        pane: Follows the run id in the file names: the window of a stream that the rows belong to.

    Raises:
        StorageError: The output cannot be written.
    """
    by_key = {row_format.key(row): row._replace(run_id=run_id) for row in rows}
    keys = sorted(by_key)
    for start in range(0, len(keys), ROWS_PER_FILE):
        chunk = keys[start : start + ROWS_PER_FILE]
        digest = hashlib.sha256("\n".join(chunk).encode()).hexdigest()[:16]
        uri = storage.join(output, folder, f"{run_id}{pane}-{digest}.parquet")
        buffer = BytesIO()
        arrow = to_table((by_key[key] for key in chunk), row_format.schema)
        pq.write_table(arrow, buffer, compression="zstd")
        storage.write_atomic(uri, buffer.getvalue())
        yield uri


class Folder:
    """Returns a row's folder below the output: its table and partition."""

    def __init__(
        self, row_format: RowFormat, run_id: str, partition_by: Sequence[str], day: str | None = None
    ) -> None:
        self._format = row_format
        self._run_id = run_id
        self._partition_by = partition_by
        self._day = day

    def __call__(self, row: Any) -> str:
        metadata = json.loads(row.metadata) if self._partition_by else {}
        partition = partition_folder(self._partition_by, self._run_id, metadata, day=self._day)
        return f"{self._format.table(row)}/{partition}".rstrip("/")


def write_folders(
    rows: Iterable[Any],
    row_format: RowFormat,
    output: str,
    run_id: str,
    partition_by: Sequence[str] = (),
    *,
    day: str | None = None,
    pane: str = "",
) -> Iterator[str]:
    """Writes each row to its table and partition; yields the URIs of the files, see `write_rows`."""
    folder_of = Folder(row_format, run_id, partition_by, day)
    by_folder: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        by_folder[folder_of(row)].append(row)
    folders = sorted(by_folder)

    def write(folder: str) -> list[str]:
        return list(write_rows(by_folder[folder], row_format, output, folder, run_id, pane=pane))

    # Partitions may be many, and a store takes its time for each.
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="af3pipe-write") as pool:
        for uris in pool.map(write, folders):
            yield from uris


def write_results(
    results: Sequence[RecordingResult],
    output: str,
    run_id: str,
    partition_by: Sequence[str] = (),
    *,
    day: str | None = None,
    pane: str = "",
) -> Iterator[str]:
    """Writes all rows of these results to all tables; yields the URIs of the files, see `write_folders`."""
    # The row of a recording is written last, so its presence guarantees the answers and dead letters it references.
    for rows, row_format in (
        ([row for found in results for row in found.answers], ANSWERS),
        ([row for found in results for row in found.dead_letters], DEAD_LETTER_ROWS),
        ([found.row for found in results], RECORDINGS),
    ):
        yield from write_folders(rows, row_format, output, run_id, partition_by, day=day, pane=pane)


def fill_empty_tables(output: str, tables: Iterable[str], run_id: str, partition_by: Sequence[str] = ()) -> None:
    """Writes a Parquet file without rows to each table that has no file, so that queries on it do not fail."""
    for table in tables:
        folder = storage.join(output, table)
        if not any(uri.endswith(".parquet") for uri in storage.list_files(folder)):
            buffer = pa.BufferOutputStream()
            pq.write_table(with_format(TABLE_SCHEMAS[table]).empty_table(), buffer, compression="zstd")
            # With the partitions of the files to come: some readers refuse a table that mixes layouts.
            partition = partition_folder(partition_by, run_id, {})
            uri = storage.join(folder, *filter(None, [partition]), f"{run_id}-empty.parquet")
            storage.write_atomic(uri, buffer.getvalue().to_pybytes())
