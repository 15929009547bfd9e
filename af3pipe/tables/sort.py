"""Sorts rows of many files with a temporary file, so that about two row groups are in memory at a time.

Rows are partitioned into ranges of `recording_id`, with bounds from a random sample, and written to the temporary
file in pieces. Then each range is read back, sorted, and split into row groups.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from af3pipe.storage import ObjectInfo
from af3pipe.tables.formats import with_format
from af3pipe.tables.keys import IDENTITY, Mask
from af3pipe.tables.layout import TABLE_SCHEMAS
from af3pipe.tables.reader import read_rows_of

ROWS_PER_GROUP = 100_000
_GROUP_BYTES = 64 << 20


class Part(NamedTuple):
    """Lists files of one folder to rewrite, and which of their rows to keep.

    Attributes:
        table: Table of the files.
        folder: URI of their folder.
        files: The files to replace.
        masks: For each file, which of its rows to keep.
        sample: Sorted `recording_id`s of a random sample of the kept rows.
        is_all: Whether to write a file without rows if none are kept, because the table has no others.
    """

    table: str
    folder: str
    files: list[ObjectInfo]
    masks: list[Mask]
    sample: list[str]
    is_all: bool


class SortedRows:
    """Writes the kept rows of a part to a temporary file and reads them back, sorted by recording.

    All ranges share one file, because there may be more ranges than a process may have open files.

    Args:
        path: Where to create the temporary file.
        part: The rows to sort.

    Attributes:
        schema: Schema of all rows, in the current format; columns that only some files have are nullable.
        group_rows: Number of rows in a row group.
    """

    def __init__(self, path: Path, part: Part) -> None:
        self._path = path
        self._by = ["recording_id", IDENTITY[part.table][-1]]
        self._pieces: dict[int, list[int]] = defaultdict(list)
        self.group_rows = 0
        total = sum(int(mask.sum()) for mask in part.masks)
        schemas = [TABLE_SCHEMAS[part.table]]
        bounds: list[str] = []
        buffered: list[pa.Table] = []
        buffered_rows = 0
        with pa.OSFile(str(path), "wb") as file:
            for rows in _kept(part):
                if not self.group_rows:
                    self.group_rows = min(ROWS_PER_GROUP, max(1, _GROUP_BYTES * len(rows) // rows.nbytes))
                    bounds = _bounds(part.sample, -(-total // self.group_rows))
                if rows.schema not in schemas:
                    schemas.append(rows.schema)
                buffered.append(rows)
                buffered_rows += len(rows)
                if buffered_rows >= self.group_rows:
                    self._put(file, buffered, bounds)
                    buffered, buffered_rows = [], 0
            if buffered:
                self._put(file, buffered, bounds)
        self.schema = with_format(pa.unify_schemas(schemas))

    def _put(self, file: Any, tables: Sequence[pa.Table], bounds: Sequence[str]) -> None:
        rows = self._sorted(pa.concat_tables(tables, promote_options="default"))
        ids = rows["recording_id"].combine_chunks()
        starts = [0, *(bisect_left(range(len(ids)), bound, key=lambda at: ids[at].as_py()) for bound in bounds)]
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(ids)], strict=True)):
            if start == end:
                continue
            self._pieces[number].append(file.tell())
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_stream(file, rows.schema, options=options) as writer:
                writer.write_table(rows.slice(start, end - start))

    def _sorted(self, rows: pa.Table) -> pa.Table:
        keys = pa.table({name: rows[name].cast(pa.large_string()) for name in self._by})
        return rows.take(pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in self._by]))

    def groups(self) -> Iterator[pa.Table]:
        """Yields the rows in sorted order, one row group at a time."""
        rest: list[pa.Table] = []
        for rows in self._ranges():
            rest.append(rows)
            while sum(map(len, rest)) >= self.group_rows:
                rows = pa.concat_tables(rest)
                yield rows.slice(0, self.group_rows)
                rest = [rows.slice(self.group_rows)]
        if sum(map(len, rest)):
            yield pa.concat_tables(rest)

    def _ranges(self) -> Iterator[pa.Table]:
        if not self._pieces:
            return
        empty = self.schema.empty_table()
        with pa.OSFile(str(self._path), "rb") as file:
            for number in sorted(self._pieces):
                pieces = [empty]
                for at in self._pieces[number]:
                    file.seek(at)
                    pieces.append(pa.ipc.open_stream(file).read_all())
                rows = self._sorted(pa.concat_tables(pieces, promote_options="default"))
                yield rows.select(self.schema.names).cast(self.schema)


def _bounds(sample: Sequence[str], ranges: int) -> list[str]:
    """Returns the ids that split the rows into about this many ranges of similar size."""
    return sorted({sample[number * len(sample) // ranges] for number in range(1, min(ranges, len(sample)))})


def _kept(part: Part) -> Iterator[pa.Table]:
    """Yields the rows to keep, with all columns of their file."""
    for number, first, rows in read_rows_of(part.files, part.table):
        rows = rows.filter(pa.array(part.masks[number][first : first + len(rows)])).replace_schema_metadata(None)
        if len(rows):
            yield rows
