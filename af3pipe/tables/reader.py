"""Reads the Parquet files of an output: all code that reads an output's rows reads them by this module.

It lists the files of each table that are current, whatever a compaction does at that time, and reads columns of them
as the current format has them (`formats.py`). Files up to 1 MiB are read whole and ahead of their turn, others by row
group. A file that a compaction replaced after it was listed is found again in the compaction's new files.
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
_TRIES = 5
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
        run_id: Of the run; `night-1` has no file of `night-10`.
        prefix: What the files' paths below the table begin with, as `run_prefix` gives it: a store lists no others.
            "" lists the whole table.
    """
    files = _list(storage.canonical(output), [table], prefix)[table]
    return [info for info in files if run_id in possible_runs(info.uri)]


def run_prefix(run_id: str, partition_by: Sequence[str], day: str | None = None) -> str:
    """What the paths of a run's files below a table begin with, as far as the run's id and day decide it.

    Args:
        run_id: Of the run.
        partition_by: As the run was given it; its first parts are known while they are `run`, or `date` with a day.
        day: The `date` of all its files, as of a run that is not a stream.
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
    """The runs that a file's name may be of: none for a compaction's, two where it may have a stream's window."""
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
        # One that began or ended while the files were listed may have its old and its new files in the list.
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
    """A file and the format that it states."""
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
    """A file's rows by row group, at least one piece; their schema states the file's format as the footer does."""
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
    """The format of the file that a piece was read from."""
    return int(rows.schema.metadata[FORMAT_KEY])


def read_rows_of(
    files: Sequence[ObjectInfo], table: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, int, pa.Table]]:
    """Reads rows of files as they were listed, in their order.

    Args:
        files: Of one table.
        table: Which.
        columns: Of the current format; missing ones are null. None: all, and those that only a file has.

    Yields:
        The file's index, the piece's first row in it, and the piece; at least one piece of each file.

    Raises:
        Rejected: A file cannot be read; not_found also where a compaction has replaced it (`retried`).
        NotATable: A file is damaged, or of another program or a newer format.
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
    """Calls `work` with the current files, and again with those of a new listing where one of them has vanished.

    Raises:
        Rejected: The output cannot be read, or files have vanished five times.
    """
    for _ in range(_TRIES - 1):
        try:
            return work(table_files(output))
        except Rejected as rejected:
            if rejected.reason is not Reason.NOT_FOUND:
                raise
    return work(table_files(output))


def read_batches(
    output: str, table: str, columns: Sequence[str] | None = None, files: Sequence[ObjectInfo] | None = None
) -> Iterator[pa.Table]:
    """Reads all rows of a table, history included, in pieces.

    No row is left out where a compaction ends meanwhile, and some may then come twice: tell rows apart by their keys.

    Args:
        output: Folder of the tables.
        table: One of them.
        columns: As for `read_rows_of`.
        files: Only these, as they were listed.

    Raises:
        Rejected, NotATable, KeyError: As `read_rows_of`.
    """
    found = table_files(output, [table])[table] if files is None else files

    def whole(info: ObjectInfo) -> list[pa.Table] | None:
        return list(read_file(output, table, info, columns)) if _is_small(info) else None

    for info, small in zip(found, each(whole, found), strict=True):
        yield from read_file(output, table, info, columns) if small is None else small


def read_file(output: str, table: str, info: ObjectInfo, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Reads the rows of one file that was listed before, in pieces, also where a compaction has replaced it since.

    Rows may then come twice, and other rows of the same run with them. Arguments and errors as of `read_rows_of`.
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
    """Reads the rows of a vanished file from compactions' files in its folder; raises `lost` if none replaced it."""
    output = storage.canonical(output)
    name = info.uri.removeprefix(storage.join(output, ""))
    wanted = None if columns is None else [*dict.fromkeys([*columns, "run_id"])]
    runs = pa.array(possible_runs(info.uri), pa.string())
    for _ in range(_TRIES):
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
    """Reads the rows that a run wrote to a table, in pieces, wherever compactions have put them.

    Rows may come twice, as of `read_batches`. Arguments and errors as of `read_rows_of`.
    """
    files = table_files(output, [table])[table]
    files = [info for info in files if is_compacted(info.uri) or run_id in possible_runs(info.uri)]
    wanted = None if columns is None else [*dict.fromkeys([*columns, "run_id"])]
    for rows in read_batches(output, table, wanted, files):
        kept = rows.filter(pc.equal(rows["run_id"], run_id))
        yield kept if columns is None else kept.select(columns)
