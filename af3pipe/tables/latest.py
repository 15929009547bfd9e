"""What holds now in an output: of each recording the newest row, and the answers and dead letters which that names.

Read with nothing but Arrow, and never all at once: keys are held in memory as Arrow arrays, rows go by in batches.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.schemas import Rejected
from af3pipe.storage import ObjectInfo
from af3pipe.storage.parquet import ParquetFile
from af3pipe.tables.layout import TABLE_SCHEMAS

Mask = npt.NDArray[np.bool_]
"""One truth value per row."""

# Sorts before all that an id may hold, so that identities sort as their ids do.
_BETWEEN = pa.scalar("\0", pa.large_string())
_AT_ONCE = 16
_SMALL_BYTES = 1 << 20
_KEYS_AT_ONCE = 1_000_000
_COMPACTED = "compacted-"
_COMPACTIONS = "_compactions"
_IDENTITY = {
    **dict.fromkeys(ANSWER_TABLES, ("recording_id", "answer_key")),
    "recordings": ("recording_id", "run_id"),
    "dead_letters": ("dead_letter_key",),
}

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


class Compaction(NamedTuple):
    """The record of a compaction, `_compactions/<id>.json` while it is under way.

    Attributes:
        compaction_id: Begins its new files' names, behind `compacted-`.
        state: `writing` its new files, which are not read; `committed`, when `replaced` are no longer read; `done`.
        updated_at: Seconds since 1970 UTC: when it last wrote a file.
        host: Where it runs.
        pid: Of its process there.
        replaced: Files below the output whose rows are in the new ones.
        dropped: By run: what its rows in the tables were, and are not any more, in the form of the run's own record.
    """

    compaction_id: str
    state: str
    updated_at: float
    host: str
    pid: int
    replaced: Sequence[str] = ()
    dropped: Mapping[str, Mapping[str, Mapping[str, int]]] = MappingProxyType({})

    def uri(self, output: str) -> str:
        """Where the record is."""
        suffix = ".done.json" if self.state == "done" else ".json"
        return storage.join(output, _COMPACTIONS, f"{self.compaction_id}{suffix}")

    def file_name(self, number: int) -> str:
        """Of a new file."""
        return f"{_COMPACTED}{self.compaction_id}-{number:05}.parquet"

    def wrote(self, uri: str) -> bool:
        """Whether a file is one of its new ones."""
        return storage.name(uri).startswith(f"{_COMPACTED}{self.compaction_id}-")


def open_compactions(output: str) -> list[Compaction]:
    """Those under way, or left there by a process that was killed."""
    return [found for found in map(_read_compaction, _records(output)) if found]


def done_compactions(output: str) -> list[Compaction]:
    """Those that are done, with what they dropped."""
    files = [info.uri for info in storage.find_files(storage.join(output, _COMPACTIONS))]
    return [found for found in each(_read_compaction, (uri for uri in files if uri.endswith(".done.json"))) if found]


def _records(output: str) -> list[str]:
    files = storage.list_files(storage.join(output, _COMPACTIONS))
    return [uri for uri in files if uri.endswith(".json") and not uri.endswith(".done.json")]


def _read_compaction(uri: str) -> Compaction | None:
    try:
        return Compaction(**json.loads(storage.read_bytes(uri)))
    except Rejected:
        return None  # it has just ended


def table_files(output: str) -> dict[str, list[ObjectInfo]]:
    """The Parquet files of each table that are to be read: no row twice because of a compaction under way."""
    output = storage.canonical(output)
    while True:
        before = open_compactions(output)
        files = {
            table: [info for info in storage.find_files(storage.join(output, table)) if _is_parquet(info.uri)]
            for table in TABLE_SCHEMAS
        }
        # One that began or ended while the files were listed may have its old and its new files in the list.
        if [(found.compaction_id, found.state) for found in open_compactions(output)] == [
            (found.compaction_id, found.state) for found in before
        ]:
            break
    replaced = {
        storage.join(output, name) for found in before if found.state == "committed" for name in found.replaced
    }
    writing = [found for found in before if found.state == "writing"]
    return {
        table: [
            info for info in infos if info.uri not in replaced and not any(found.wrote(info.uri) for found in writing)
        ]
        for table, infos in files.items()
    }


def _is_parquet(uri: str) -> bool:
    return uri.endswith(".parquet") and not storage.name(uri).startswith(".")


def each(function: Callable[[_Item], _Value], items: Iterable[_Item]) -> Iterator[_Value]:
    """`map` with a few calls ahead of their turn, because a store answers late: results come in order."""
    ahead: deque[Future[_Value]] = deque()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) == _AT_ONCE:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class NotATable(Exception):
    """A file of a table that is none: which, why, and what to do.

    Attributes:
        info: The file.
    """

    def __init__(self, info: ObjectInfo, why: str) -> None:
        super().__init__(f"{info.uri} {why}")
        self.info = info


@contextmanager
def _parquet(info: ObjectInfo, columns: Sequence[str] | None) -> Iterator[ParquetFile]:
    with storage.open_input(info.uri, size_bytes=info.size_bytes) as file:
        try:
            parquet = ParquetFile(file)
            lacking = set(columns or ()) - set(parquet.schema_arrow.names)
            if lacking:
                raise NotATable(info, f"has no column {sorted(lacking)[0]}: another version or program wrote it")
            yield parquet
        except (pa.ArrowException, OSError) as error:
            raise NotATable(info, f"is not whole: {str(error).splitlines()[0]}") from error


def read_columns(info: ObjectInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """Some columns of a Parquet file.

    Raises:
        Rejected: It cannot be read.
        NotATable: It is not Parquet, or lacks one of the columns.
    """
    with _parquet(info, columns) as parquet:
        return parquet.read(columns)


def read_rows_of(
    files: Sequence[ObjectInfo], columns: Sequence[str] | None = None
) -> Iterator[tuple[int, int, pa.Table]]:
    """Rows of Parquet files in their order, in pieces: small files whole, and ahead of time; others by row group.

    Yields:
        The file's index, the piece's first row in it, and the piece.
    """

    def whole(info: ObjectInfo) -> pa.Table | None:
        return read_columns(info, columns) if (info.size_bytes or 0) <= _SMALL_BYTES else None

    for number, small in enumerate(each(whole, files)):
        if small is not None:
            yield number, 0, small
            continue
        first = 0
        with _parquet(files[number], columns) as parquet:
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns)
                yield number, first, rows
                first += len(rows)


def read_keys(files: Sequence[ObjectInfo], table: str, extra: Sequence[str] = ()) -> pa.Table:
    """The keys of a table's rows, in the order of the files and of their rows.

    Returns:
        Columns `identity` (rows equal in it are the same row), `run_id` and those of `extra` as dictionaries,
        `created_at` (microseconds), `file` (index into `files`).
    """

    def read(numbered: tuple[int, ObjectInfo]) -> pa.Table:
        number, info = numbered
        columns = dict.fromkeys([*_IDENTITY[table], "run_id", "created_at", *extra])
        found = read_columns(info, list(columns))
        keys = {
            "identity": _identity(found, table),
            "run_id": found["run_id"].dictionary_encode(),
            "created_at": found["created_at"].cast(pa.int64()),
            "file": pa.array(np.full(len(found), number, np.int32)),
            **{name: found[name].dictionary_encode() for name in extra if name != "run_id"},
        }
        return pa.table(keys)

    schema = {"identity": pa.large_string(), "run_id": _WORDS, "created_at": pa.int64(), "file": pa.int32()}
    empty = pa.schema({**schema, **dict.fromkeys(extra, _WORDS)}).empty_table()
    return pa.concat_tables([empty, *each(read, enumerate(files))]).unify_dictionaries()


_WORDS = pa.dictionary(pa.int32(), pa.string())


def _identity(rows: pa.Table, table: str) -> pa.ChunkedArray:
    parts = [rows[name].cast(pa.large_string()) for name in _IDENTITY[table]]
    return pc.binary_join_element_wise(*parts, _BETWEEN) if len(parts) > 1 else parts[0]


def codes(values: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """Equal numbers for equal values, from 0 up without gaps."""
    encoded = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    encoded = encoded if pa.types.is_dictionary(encoded.type) else encoded.dictionary_encode()
    return np.asarray(encoded.indices)


def newest(identity: npt.NDArray[np.int32], keys: pa.Table) -> Mask:
    """Of the rows of each identity, the one with the greatest (created_at, run_id)."""
    if not len(identity) or identity.max() + 1 == len(identity):
        return np.ones(len(identity), bool)
    runs = keys["run_id"].combine_chunks()
    rank = np.argsort(np.argsort(runs.dictionary.to_numpy(zero_copy_only=False).astype(str)))
    order = np.lexsort((rank[np.asarray(runs.indices)], keys["created_at"].to_numpy(), identity))
    is_last = np.append(np.diff(identity[order]) != 0, True)
    kept = np.zeros(len(identity), bool)
    kept[order[is_last]] = True
    return kept


def split(mask: Mask, keys: pa.Table, files: int) -> list[Mask]:
    """A mask over all rows of a table as one for each file."""
    ends = np.cumsum(np.bincount(keys["file"].to_numpy(), minlength=files))
    return np.split(mask, ends[:-1]) if files else []


def named_keys(
    files: Sequence[ObjectInfo], column: str, masks: Sequence[Mask] | None = None
) -> Iterator[tuple[pa.ChunkedArray, npt.NDArray[np.int64]]]:
    """The keys that rows of `recordings/` name, about a million at a time.

    Args:
        files: Of that table.
        column: `answer_keys` or `dead_letter_keys`.
        masks: Which rows of each file to look at; all by default.

    Yields:
        Keys as `read_keys` gives their `identity`, and the number of the row of `recordings/` that names each.
    """

    def read(number: int) -> pa.Table:
        return read_columns(files[number], ["recording_id", column])

    first, held, sources = 0, [], []
    for number, rows in enumerate(each(read, range(len(files)))):
        positions = np.arange(first, first + len(rows))
        first += len(rows)
        if masks is not None:
            rows, positions = rows.filter(pa.array(masks[number])), positions[masks[number]]
        lists = rows[column].combine_chunks()
        parents = pc.list_parent_indices(lists)
        keys = pc.list_flatten(lists).cast(pa.large_string())
        if column == "answer_keys":
            ids = rows["recording_id"].combine_chunks().take(parents).cast(pa.large_string())
            keys = pc.binary_join_element_wise(ids, keys, _BETWEEN)
        held.append(keys)
        sources.append(positions[np.asarray(parents)])
        if sum(map(len, held)) >= _KEYS_AT_ONCE:
            yield pa.chunked_array(held), np.concatenate(sources)
            held, sources = [], []
    if held:
        yield pa.chunked_array(held), np.concatenate(sources)


class Latest:
    """What holds now. Keys are read when they are first asked for; rows each time.

    Args:
        output: Folder of the tables.
        files: As `table_files` gives them, where they are known.
    """

    def __init__(self, output: str, files: dict[str, list[ObjectInfo]] | None = None) -> None:
        self.files = table_files(output) if files is None else files

    @cached_property
    def _recordings(self) -> list[Mask]:
        files = self.files["recordings"]
        keys = read_keys(files, "recordings", ["recording_id"])
        return split(newest(codes(keys["recording_id"]), keys), keys, len(files))

    def _named(self, column: str) -> pa.ChunkedArray:
        found = [keys for keys, _ in named_keys(self.files["recordings"], column, self._recordings)]
        return pa.chunked_array([chunk for keys in found for chunk in keys.chunks], pa.large_string())

    @cached_property
    def _answers(self) -> pa.ChunkedArray:
        return self._named("answer_keys")

    def masks(self, table: str) -> list[Mask]:
        """Which rows of each of the table's files hold: none twice."""
        if table == "recordings":
            return self._recordings
        files = self.files[table]
        keys = read_keys(files, table)
        named = self._answers if table in ANSWER_TABLES else self._named("dead_letter_keys")
        holds = newest(codes(keys["identity"]), keys) & is_in(keys["identity"], named)
        return split(holds, keys, len(files))

    def batches(self, table: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The table's rows that hold, in the order of its files.

        Raises:
            KeyError: There is no such table.
            Rejected: A file cannot be read; not_found where a compaction has just replaced it: ask again.
        """
        held = [(info, mask) for info, mask in zip(self.files[table], self.masks(table), strict=True) if mask.any()]
        for number, first, rows in read_rows_of([info for info, _ in held], columns):
            yield rows.filter(pa.array(held[number][1][first : first + len(rows)]))

    def read(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The same as one table in memory."""
        schema = TABLE_SCHEMAS[table]
        empty = (schema if columns is None else pa.schema([schema.field(name) for name in columns])).empty_table()
        return pa.concat_tables([empty, *self.batches(table, columns)], promote_options="default")


def is_in(values: pa.ChunkedArray, among: Any) -> Mask:
    """Which of `values` are among others."""
    among = among.combine_chunks() if isinstance(among, pa.ChunkedArray) else among
    return np.asarray(pc.is_in(values, value_set=among).combine_chunks().to_numpy(zero_copy_only=False), dtype=bool)


def latest(output: str) -> Latest:
    """What holds now in an output: `latest(OUT).read("captions")`."""
    return Latest(output)


def export_latest(output: str, target: str, tables: Sequence[str]) -> dict[str, int]:
    """Writes what holds now to `target`, a Parquet file for each table that has rows.

    Returns:
        URI of each file to its number of rows.

    Raises:
        Rejected, NotATable: The output cannot be read.
        StorageError: The target cannot be written.
    """
    view, written = Latest(output), {}
    for table in tables:
        buffer, rows = pa.BufferOutputStream(), 0
        with pq.ParquetWriter(buffer, TABLE_SCHEMAS[table], compression="zstd") as writer:
            for piece in view.batches(table, TABLE_SCHEMAS[table].names):
                writer.write_table(piece.cast(TABLE_SCHEMAS[table]))
                rows += len(piece)
        if rows:
            uri = storage.join(target, f"{table}.parquet")
            storage.write_atomic(uri, buffer.getvalue().to_pybytes())
            written[uri] = rows
    return written
