"""Rows of many files in one order, by way of a temporary file: memory holds a row group at a time."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from af3pipe.storage import ObjectInfo
from af3pipe.tables.latest import Mask, read_rows_of
from af3pipe.tables.layout import TABLE_SCHEMAS

ROWS_PER_GROUP = 100_000
_GROUP_BYTES = 64 << 20
_PLACE = "_place"


class Part(NamedTuple):
    """Files of one folder whose rows become new files.

    Attributes:
        table: Of them.
        folder: Their URI.
        files: To be replaced.
        masks: For each, which of its rows stay.
        places: For each row that stays, in the order of the files, its place in the new ones.
        is_all: Whether the table has no other rows: then a file without rows is written rather than none.
    """

    table: str
    folder: str
    files: list[ObjectInfo]
    masks: list[Mask]
    places: npt.NDArray[np.int64]
    is_all: bool


def places_of(keys: pa.Table) -> npt.NDArray[np.int64]:
    """For each row its place when all are sorted by recording, then identity."""
    by = keys.select(["identity"]).append_column("recording_id", keys["recording_id"].cast(pa.string()))
    order = pc.sort_indices(by, sort_keys=[("recording_id", "ascending"), ("identity", "ascending")])
    places = np.empty(len(keys), np.int64)
    places[np.asarray(order)] = np.arange(len(keys))
    return places


class SortedRows:
    """Rows on their way into order: each goes to its row group's pieces in one temporary file, then comes back.

    One file for all, because there may be more row groups than a process may have files open.
    """

    def __init__(self, path: Path, part: Part) -> None:
        self._path = path
        self._pieces: dict[int, list[int]] = defaultdict(list)
        self._group_rows = 0
        schemas = [TABLE_SCHEMAS[part.table]]
        held: list[pa.Table] = []
        held_rows = 0
        with pa.OSFile(str(path), "wb") as file:
            for rows, places in _kept(part):
                if rows.schema not in schemas:
                    schemas.append(rows.schema)  # of another version
                if not self._group_rows:
                    self._group_rows = min(ROWS_PER_GROUP, max(1, _GROUP_BYTES * len(rows) // rows.nbytes))
                held.append(rows.append_column(_PLACE, pa.array(places)))
                held_rows += len(rows)
                if held_rows >= self._group_rows:
                    self._put(file, held)
                    held, held_rows = [], 0
            if held:
                self._put(file, held)
        self.schema = pa.unify_schemas(schemas)

    def _put(self, file: Any, tables: Sequence[pa.Table]) -> None:
        rows = pa.concat_tables(tables, promote_options="default")
        places = rows[_PLACE].to_numpy()
        order = np.argsort(places)
        groups = places[order] // self._group_rows
        rows = rows.take(pa.array(order))
        starts = np.flatnonzero(np.append(True, np.diff(groups) != 0))
        for start, end in zip(starts, [*starts[1:], len(groups)], strict=True):
            self._pieces[int(groups[start])].append(file.tell())
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_stream(file, rows.schema, options=options) as writer:
                writer.write_table(rows.slice(start, end - start))

    def groups(self) -> Iterator[pa.Table]:
        """The rows of one row group after the other, sorted."""
        empty = self.schema.append(pa.field(_PLACE, pa.int64())).empty_table()
        if not self._pieces:
            return
        with pa.OSFile(str(self._path), "rb") as file:
            for group in sorted(self._pieces):
                pieces = [empty]
                for at in self._pieces[group]:
                    file.seek(at)
                    pieces.append(pa.ipc.open_stream(file).read_all())
                rows = pa.concat_tables(pieces, promote_options="default")
                order = np.argsort(rows[_PLACE].to_numpy())
                yield rows.take(pa.array(order)).select(self.schema.names).cast(self.schema)


def _kept(part: Part) -> Iterator[tuple[pa.Table, npt.NDArray[np.int64]]]:
    """The rows that stay, and their places."""
    taken = 0
    for number, first, rows in read_rows_of(part.files):
        rows = rows.filter(pa.array(part.masks[number][first : first + len(rows)]))
        if len(rows):
            yield rows, part.places[taken : taken + len(rows)]
            taken += len(rows)
