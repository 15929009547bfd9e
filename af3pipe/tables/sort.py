"""Sorts rows of many files by way of a temporary file: memory holds about two row groups at a time.

Rows go to ranges of `recording_id`, whose bounds come from a random sample, as pieces of the temporary file;
then one range after the other comes back, is sorted by its text, and is cut into row groups.
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
    """Files of one folder whose rows become new files.

    Attributes:
        table: Of them.
        folder: Their URI.
        files: To be replaced.
        masks: For each, which of its rows stay.
        sample: `recording_id` of a random sample of the rows that stay, sorted.
        is_all: Whether the table has no other rows: then a file without rows is written rather than none.
    """

    table: str
    folder: str
    files: list[ObjectInfo]
    masks: list[Mask]
    sample: list[str]
    is_all: bool


class SortedRows:
    """Writes the rows of a part to a temporary file, and reads them back in the order of their recordings.

    One file for all ranges, because there may be more of them than a process may have files open.

    Args:
        path: Of the temporary file.
        part: Whose rows.

    Attributes:
        schema: Of all rows, in the current format; columns that only some of the files have are nullable.
        group_rows: Rows in a row group.
    """

    def __init__(self, path: Path, part: Part) -> None:
        self._path = path
        self._by = ["recording_id", IDENTITY[part.table][-1]]
        self._pieces: dict[int, list[int]] = defaultdict(list)
        self.group_rows = 0
        total = sum(int(mask.sum()) for mask in part.masks)
        schemas = [TABLE_SCHEMAS[part.table]]
        bounds: list[str] = []
        held: list[pa.Table] = []
        held_rows = 0
        with pa.OSFile(str(path), "wb") as file:
            for rows in _kept(part):
                if not self.group_rows:
                    self.group_rows = min(ROWS_PER_GROUP, max(1, _GROUP_BYTES * len(rows) // rows.nbytes))
                    bounds = _bounds(part.sample, -(-total // self.group_rows))
                if rows.schema not in schemas:
                    schemas.append(rows.schema)
                held.append(rows)
                held_rows += len(rows)
                if held_rows >= self.group_rows:
                    self._put(file, held, bounds)
                    held, held_rows = [], 0
            if held:
                self._put(file, held, bounds)
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
        """Yields one row group after the other, sorted."""
        left: list[pa.Table] = []
        for rows in self._ranges():
            left.append(rows)
            while sum(map(len, left)) >= self.group_rows:
                rows = pa.concat_tables(left)
                yield rows.slice(0, self.group_rows)
                left = [rows.slice(self.group_rows)]
        if sum(map(len, left)):
            yield pa.concat_tables(left)

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
    """Ids that cut the rows into about so many ranges of about the same size."""
    return sorted({sample[number * len(sample) // ranges] for number in range(1, min(ranges, len(sample)))})


def _kept(part: Part) -> Iterator[pa.Table]:
    """The rows that stay, with every column that their file has."""
    for number, first, rows in read_rows_of(part.files, part.table):
        rows = rows.filter(pa.array(part.masks[number][first : first + len(rows)])).replace_schema_metadata(None)
        if len(rows):
            yield rows
