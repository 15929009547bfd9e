"""Reads the latest view of an output: each recording's newest row, and the answers and dead letters it references.

A recording is one `recording_id` of one source: an id that manifests gave to two files counts as two recordings, each
with its newest row, because the answers of both are still valid. Rows are read in batches; memory use: hashes of the
keys of one table and of the keys that `recordings/` references.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.schemas import Reason, Rejected
from af3pipe.storage import ObjectInfo
from af3pipe.tables.formats import SETTLED_STATE, NewerFormat, NotATable, states, with_format
from af3pipe.tables.keys import Hashes, KeySet, Mask, named_keys, read_keys
from af3pipe.tables.layout import TABLE_SCHEMAS
from af3pipe.tables.reader import read_rows_of, table_files

__all__ = ["Latest", "NewerFormat", "NotATable", "codes", "export_latest", "is_in", "latest", "table_files"]

_ATTEMPTS = 5

_Result = TypeVar("_Result")


class Latest:
    """Reads the latest view of an output. Keys are read on first use and cached; rows are read on each call.

    Args:
        output: Folder of the tables.
        files: Files by table, if already listed by `table_files`.
    """

    def __init__(self, output: str, files: Mapping[str, Sequence[ObjectInfo]] | None = None) -> None:
        self._output = storage.canonical(output)
        self.files: Mapping[str, Sequence[ObjectInfo]] = table_files(self._output) if files is None else files

    @cached_property
    def _recordings(self) -> tuple[list[Mask], Hashes]:
        keys = read_keys(self.files["recordings"], "recordings")
        newest = keys.newest(KeySet(keys.recording).codes)
        return keys.split(newest), keys.recording[newest]

    def _named(self, column: str) -> KeySet:
        found = [named.hashes for named in named_keys(self.files["recordings"], column, self._recordings[0])]
        return KeySet(np.concatenate([np.zeros((0, 2), np.uint64), *found]))

    @cached_property
    def _answers(self) -> KeySet:
        return self._named("answer_keys")

    @cached_property
    def _dead_letters(self) -> KeySet:
        return self._named("dead_letter_keys")

    def _view(self, table: str) -> tuple[list[Mask], Hashes]:
        """Returns for each file a mask of its rows in the view, and the identities of all rows in the view."""
        if table == "recordings":
            return self._recordings
        named = self._answers if table in ANSWER_TABLES else self._dead_letters
        keys = read_keys(self.files[table], table)
        mask = keys.newest(KeySet(keys.identity).codes) & named.has(keys.identity)
        return keys.split(mask), keys.identity[mask]

    def _retried(self, work: Callable[[], _Result]) -> _Result:
        """Calls `work`; lists the files and calls it again if a compaction has replaced one meanwhile."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return work()
            except Rejected as rejected:
                self._list_again(rejected)
        return work()

    def _list_again(self, rejected: Rejected) -> None:
        # Referenced keys stay cached, so that answers match the rows of recordings as they were read.
        if rejected.reason is not Reason.NOT_FOUND:
            raise rejected
        self.files = table_files(self._output)
        self.__dict__.pop("_recordings", None)

    def masks(self, table: str) -> list[Mask]:
        """Returns a mask for each of the table's `files`: which rows are in the view, without copies.

        Raises:
            KeyError: There is no such table.
            Rejected, NotATable: The output cannot be read; not_found if a compaction has replaced a file.
        """
        return self._view(table)[0]

    def batches(self, table: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Reads the table's rows in the view, in the order of its files, also while a compaction replaces files.

        Args:
            table: One of the tables.
            columns: Columns of the current format (`formats.TABLE_SCHEMAS`); None: all.

        Raises:
            KeyError: There is no such table or column.
            Rejected, NotATable: The output cannot be read.
        """
        columns = TABLE_SCHEMAS[table].names if columns is None else columns
        yielded: list[Hashes] = []
        for turn in range(_ATTEMPTS):
            masks, identities = self._retried(lambda: self._view(table))
            is_new = _is_new(identities, yielded)
            count = 0
            try:
                for rows in self._rows(table, columns, masks):
                    kept = is_new[count : count + len(rows)]
                    yield rows if kept.all() else rows.filter(pa.array(kept))
                    count += len(rows)
                return
            except Rejected as rejected:
                if turn == _ATTEMPTS - 1:
                    raise
                self._list_again(rejected)
                yielded.append(identities[:count])

    def _rows(self, table: str, columns: Sequence[str], masks: Sequence[Mask]) -> Iterator[pa.Table]:
        pairs = [(info, mask) for info, mask in zip(self.files[table], masks, strict=True) if mask.any()]
        has_state = table == "recordings" and "terminal_state" in columns
        wanted = [*columns, *([SETTLED_STATE] if has_state and SETTLED_STATE not in columns else [])]
        for number, first, rows in read_rows_of([info for info, _ in pairs], table, wanted):
            kept = rows.filter(pa.array(pairs[number][1][first : first + len(rows)]))
            if has_state:
                at = kept.schema.get_field_index("terminal_state")
                kept = kept.set_column(at, kept.schema.field(at), states(kept))
            yield kept.select(columns).replace_schema_metadata(None)

    def read(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads the rows of `batches` into one table in memory. Arguments and errors as in `batches`."""
        schema = TABLE_SCHEMAS[table]
        empty = (schema if columns is None else pa.schema([schema.field(name) for name in columns])).empty_table()
        return pa.concat_tables([empty, *self.batches(table, columns)], promote_options="default")


def _is_new(identities: Hashes, yielded: Sequence[Hashes]) -> Mask:
    if not yielded:
        return np.ones(len(identities), bool)
    return ~KeySet(np.concatenate(yielded)).has(identities)


def latest(output: str) -> Latest:
    """Opens the latest view of an output: `latest(OUT).read("captions")`."""
    return Latest(output)


def export_latest(output: str, target: str, tables: Sequence[str]) -> dict[str, int]:
    """Writes the latest view to the folder `target`, one Parquet file for each table that has rows.

    Returns:
        Number of rows by URI of the file.

    Raises:
        Rejected, NotATable: The output cannot be read.
        StorageError: The target cannot be written.
    """
    view, written = Latest(output), {}
    for table in tables:
        # Rows of older formats have nulls wherever a column came later.
        schema = with_format(pa.schema([field.with_nullable(True) for field in TABLE_SCHEMAS[table]]))
        buffer, count = pa.BufferOutputStream(), 0
        with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
            for rows in view.batches(table):
                writer.write_table(rows.cast(schema))
                count += len(rows)
        if count:
            uri = storage.join(target, f"{table}.parquet")
            storage.write_atomic(uri, buffer.getvalue().to_pybytes())
            written[uri] = count
    return written


def codes(values: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """Encodes texts as integers: equal texts get equal integers, from 0 up without gaps."""
    return np.asarray(values.combine_chunks().dictionary_encode().indices)


def is_in(values: pa.ChunkedArray, among: Any) -> Mask:
    """Returns a mask: which of `values` are in `among`."""
    among = among.combine_chunks() if isinstance(among, pa.ChunkedArray) else among
    return np.asarray(pc.is_in(values, value_set=among).combine_chunks().to_numpy(zero_copy_only=False), dtype=bool)
