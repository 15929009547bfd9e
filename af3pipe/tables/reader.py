"""Reads the Parquet files of an output; all code that reads an output's rows uses this module.

It lists the current files of each table, also while a compaction is running, and converts their columns to the
current format (`formats.py`). Files of at most 1 MiB are prefetched whole, others are read by row group. If a
compaction replaced a file after it was listed, its rows are read from the compaction's new files.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected
from af3pipe.storage import ObjectInfo
from af3pipe.storage.parquet import ParquetFile
from af3pipe.tables.compaction_record import Compactions, done_compactions, is_compacted
from af3pipe.tables.formats import NotATable, check_columns, check_format, normalised
from af3pipe.tables.layout import FORMAT_KEY, TABLE_SCHEMAS, partition_folder
from af3pipe.tables.prefetch import each

_SMALL_BYTES = 1 << 20
_ATTEMPTS = 5
_REQUIRED = {
    "recordings": ("recording_id", "run_id", "created_at"),
    "dead_letters": ("dead_letter_key", "run_id", "created_at"),
}
_REQUIRED_OF_ANSWERS = ("recording_id", "answer_key", "run_id", "created_at")
# <run_id>-<digest of its keys>.parquet; a stream's also have the time at which a window began.
_FILE_OF_RUN = re.compile(r"(.+)-(?:[0-9a-f]{16}|empty)\.parquet")
_WINDOW = re.compile(r"-\d{8}T\d{6}Z$")

_Result = TypeVar("_Result")
Files = Mapping[str, Sequence[ObjectInfo]]
"""Parquet files by table."""


def table_files(output: str, tables: Sequence[str] = tuple(TABLE_SCHEMAS)) -> dict[str, list[ObjectInfo]]:
    """Lists the current Parquet files of each table: no row is in two of them because of a compaction.

    Raises:
        Rejected: The output cannot be listed.
        NewerFormat: A later version of af3pipe compacted it.
    """
    return _list(storage.canonical(output), tables, "")


def run_files(output: str, table: str, run_id: str, prefix: str = "") -> list[ObjectInfo]:
    """Lists the current Parquet files that a run wrote to a table.

    Rows of the run that a compaction moved to its own files are not in these; `rows_of_run` reads those, too.

    Args:
        output: Folder of the tables.
        table: One of them.
        run_id: The run; files of `night-10` do not match `night-1`.
        prefix: Prefix of the files' paths below the table, as `run_prefix` returns it, so that a store lists only
            these; "" lists the whole table.
    """
    files = _list(storage.canonical(output), [table], prefix)[table]
    return [info for info in files if run_id in possible_runs(info.uri)]


def files_of_run(output: str, run_id: str) -> dict[str, list[str]]:
    """Lists the URIs of the Parquet files that a run wrote, by table; see `run_files`."""
    return {table: [info.uri for info in run_files(output, table, run_id)] for table in TABLE_SCHEMAS}


def run_prefix(run_id: str, partition_by: Sequence[str], day: str | None = None) -> str:
    """Returns the longest known prefix of the paths of a run's files below a table.

    Args:
        run_id: The run.
        partition_by: Of the run; the prefix ends before the first part that is not `run`, or `date` with a `day`.
        day: The `date` of all its files; None for a stream, whose files have different ones.
    """
    known: list[str] = []
    for name in partition_by:
        if not (name == "run" or (name == "date" and day)):
            break
        known.append(name)
    folder = partition_folder(known, run_id, {}, day=day)
    own = f"{run_id}-" if len(known) == len(partition_by) else ""
    return f"{folder}/{own}" if folder else own


def possible_runs(uri: str) -> tuple[str, ...]:
    """Returns the run ids that a file name may begin with: none for a compacted file, two if a window may follow."""
    name = storage.name(uri)
    if is_compacted(name):
        return ()
    found = _FILE_OF_RUN.fullmatch(name)
    run = found[1] if found else name.rpartition("-")[0]
    without_window = _WINDOW.sub("", run)
    return (run,) if without_window in ("", run) else (run, without_window)


def _list(output: str, tables: Sequence[str], prefix: str) -> dict[str, list[ObjectInfo]]:
    while True:
        before = Compactions(output)
        # What a compaction has replaced is known only where its new files are listed, too.
        narrowed = "" if any(found.state == "committed" for found in before.under_way) else prefix
        files = {
            table: [
                info for info in storage.find_files(storage.join(output, table), narrowed) if _is_parquet(info.uri)
            ]
            for table in tables
        }
        # If a compaction began or ended during the listing, the list may have both its old and its new files.
        if Compactions(output).states == before.states:
            break
    current = before.readable(output, files)
    if prefix and not narrowed:
        stems = {table: storage.join(output, table) + "/" + prefix for table in tables}
        current = {t: [info for info in infos if info.uri.startswith(stems[t])] for t, infos in current.items()}
    return current


def _is_parquet(uri: str) -> bool:
    return uri.endswith(".parquet") and not storage.name(uri).startswith(".")


@contextmanager
def _opened(info: ObjectInfo, table: str) -> Iterator[tuple[ParquetFile, int]]:
    """Opens a Parquet file; returns it with its format version."""
    with storage.open_input(info.uri, size_bytes=info.size_bytes) as file:
        try:
            parquet = ParquetFile(file)
            found = check_format(info, (parquet.metadata.metadata or {}).get(FORMAT_KEY))
            lacking = set(_REQUIRED.get(table, _REQUIRED_OF_ANSWERS)) - set(parquet.schema_arrow.names)
            if lacking:
                raise NotATable(info, f"has no column {min(lacking)}: another program wrote it")
            yield parquet, found
        except (pa.ArrowException, OSError) as error:
            raise NotATable(info, f"is damaged: {str(error).splitlines()[0]}") from error


def _pieces(info: ObjectInfo, table: str, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """Yields a file's rows by row group, at least one piece, with the file's format in the metadata of the schema."""
    if columns is not None:
        check_columns(table, columns)
    with _opened(info, table) as (parquet, found):
        names = parquet.schema_arrow.names
        there = None if columns is None else [name for name in columns if name in names]
        metadata = {FORMAT_KEY: str(found).encode()}
        empty = parquet.schema_arrow.empty_table()
        groups = (
            parquet.read_row_group(number, there or names[:1])
            if there is not None
            else parquet.read_row_group(number)
            for number in range(parquet.num_row_groups)
        )
        for rows in groups if parquet.num_row_groups else [empty]:
            yield normalised(rows, table, columns).replace_schema_metadata(metadata)


def format_of(rows: pa.Table) -> int:
    """Returns the format version of the file that rows were read from."""
    return int(rows.schema.metadata[FORMAT_KEY])


def read_rows_of(
    files: Sequence[ObjectInfo], table: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, int, pa.Table]]:
    """Reads rows of listed files, in the order of the files.

    Args:
        files: Files of one table.
        table: That table.
        columns: Columns of the current format; null where a file lacks them. None: all, and further ones of a file.

    Yields:
        The file's index, the piece's first row in it, and the piece; at least one piece of each file.

    Raises:
        Rejected: A file cannot be read; not_found also if a compaction has replaced it (`retried`).
        NotATable: A file is damaged, has a newer format, or was written by another program.
        KeyError: There is no such column.
    """

    def whole(info: ObjectInfo) -> list[pa.Table] | None:
        return list(_pieces(info, table, columns)) if _is_small(info) else None

    for number, small in enumerate(each(whole, files)):
        first = 0
        for rows in _pieces(files[number], table, columns) if small is None else small:
            yield number, first, rows
            first += len(rows)


def _is_small(info: ObjectInfo) -> bool:
    return info.size_bytes is not None and info.size_bytes <= _SMALL_BYTES


def retried(output: str, work: Callable[[dict[str, list[ObjectInfo]]], _Result]) -> _Result:
    """Calls `work` with the current files; lists them and calls it again if one of them no longer exists.

    Raises:
        Rejected: The output cannot be read, or files were missing in all five attempts.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return work(table_files(output))
        except Rejected as rejected:
            if rejected.reason is not Reason.NOT_FOUND:
                raise
    return work(table_files(output))


def read_batches(
    output: str, table: str, columns: Sequence[str] | None = None, files: Sequence[ObjectInfo] | None = None
) -> Iterator[pa.Table]:
    """Reads all rows of a table in pieces, including those that are not in the latest view.

    If a compaction ends meanwhile, no row is missed, but some may be repeated: deduplicate rows by their keys.

    Args:
        output: Folder of the tables.
        table: One of them.
        columns: See `read_rows_of`.
        files: Reads only these files, as they were listed; default: all.

    Raises:
        Rejected, NotATable, KeyError: As `read_rows_of`.
    """
    found = table_files(output, [table])[table] if files is None else files

    def whole(info: ObjectInfo) -> list[pa.Table] | None:
        return list(read_file(output, table, info, columns)) if _is_small(info) else None

    for info, small in zip(found, each(whole, found), strict=True):
        yield from read_file(output, table, info, columns) if small is None else small


def read_file(output: str, table: str, info: ObjectInfo, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Reads the rows of one listed file in pieces, even if a compaction has replaced the file since.

    In that case, rows may be repeated, and other rows of the same run may be included. Arguments and errors as in
    `read_rows_of`.
    """
    try:
        yield from _pieces(info, table, columns)
    except Rejected as rejected:
        if rejected.reason is not Reason.NOT_FOUND:
            raise
        yield from _read_replacement(output, table, info, columns, rejected)


def _read_replacement(
    output: str, table: str, info: ObjectInfo, columns: Sequence[str] | None, lost: Rejected
) -> Iterator[pa.Table]:
    """Reads the rows of a missing file from compacted files in its folder; raises `lost` if none replaced it."""
    output = storage.canonical(output)
    name = info.uri.removeprefix(storage.join(output, ""))
    wanted = None if columns is None else [*dict.fromkeys([*columns, "run_id"])]
    runs = pa.array(possible_runs(info.uri), pa.string())
    for _ in range(_ATTEMPTS):
        if not any(name in found.replaced for found in [*Compactions(output).under_way, *done_compactions(output)]):
            raise lost
        there = table_files(output, [table])[table]
        folder = storage.parent(info.uri)
        there = [other for other in there if is_compacted(other.uri) and storage.parent(other.uri) == folder]
        try:
            for _, _, rows in read_rows_of(there, table, wanted):
                kept = rows.filter(pc.is_in(rows["run_id"], value_set=runs)) if len(runs) else rows
                yield kept if columns is None else kept.select(columns)
            return
        except Rejected as rejected:
            if rejected.reason is not Reason.NOT_FOUND:
                raise
    raise lost


def rows_of_run(output: str, table: str, run_id: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Reads the rows that a run wrote to a table, in pieces, including those in compacted files.

    Rows may be repeated, see `read_batches`. Arguments and errors as in `read_rows_of`.
    """
    files = table_files(output, [table])[table]
    files = [info for info in files if is_compacted(info.uri) or run_id in possible_runs(info.uri)]
    wanted = None if columns is None else [*dict.fromkeys([*columns, "run_id"])]
    for rows in read_batches(output, table, wanted, files):
        kept = rows.filter(pc.equal(rows["run_id"], run_id))
        yield kept if columns is None else kept.select(columns)
