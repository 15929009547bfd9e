"""Many small files to few, sorted and without rows that are there twice; killed at any point, no row is lost.

A compaction leaves a record below `_compactions/` before anything else: while it is `writing`, readers pass over its
new files; with one PUT it is `committed`, and they pass over the files it replaced, which are then deleted.
"""

import json
import os
import re
import socket
import tempfile
import time
from collections import Counter, defaultdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.storage import ObjectInfo
from af3pipe.tables.latest import (
    Compaction,
    Latest,
    Mask,
    codes,
    each,
    newest,
    open_compactions,
    read_keys,
    read_rows_of,
    split,
    table_files,
)
from af3pipe.tables.layout import TABLE_SCHEMAS, new_run_id
from af3pipe.tables.sort import Part, SortedRows, places_of

DEFAULT_FILE_MIB = 128
TAKEN_FOR_KILLED_S = 3600.0
"""A compaction that has not written a file for this long is taken to be dead."""
_TEMPORARY_FOR = timedelta(days=1)
_RUN_WITH_PANE = re.compile(r"(.+)-\d{8}T\d{6}Z-[0-9a-f]+\.parquet")
_CATEGORY = {"recordings": "terminal_state", "dead_letters": "reason"}


class CompactError(Exception):
    """Nothing was changed: why, and what to do."""


class Compacted(NamedTuple):
    """What a compaction did.

    Attributes:
        compaction_id: Names it; None where there was nothing to do.
        files_before: That were read and replaced.
        files_after: That were written instead.
        rows: In those.
        duplicates: Rows left out because a newer one of the same identity is there.
        differing: Identities of which such rows had another text than the one that was kept.
        superseded: Rows left out because they hold no more.
        left_alone: Files of runs that have not finished.
        recovered: Compactions that were killed and are now finished or undone.
        temporary: Leftovers of killed writes that were removed.
    """

    compaction_id: str | None
    files_before: int
    files_after: int
    rows: int
    duplicates: int
    differing: int
    superseded: int
    left_alone: int
    recovered: int
    temporary: int


def recover(output: str, *, killed_after_s: float = TAKEN_FOR_KILLED_S) -> list[str]:
    """Finishes each compaction that was killed after its commit, and undoes each that was killed before.

    Args:
        output: Folder of the tables.
        killed_after_s: One that writes is left alone until it has not written for so long; one of this machine whose
            process is gone is not waited for.

    Returns:
        Their ids.

    Raises:
        StorageError: A file cannot be deleted, or a record written.
    """
    output, ended = storage.canonical(output), []
    for found in open_compactions(output):
        if found.state == "committed":
            _finish(output, found)
        elif _is_dead(found, killed_after_s):
            _undo(output, found)
        else:
            continue
        ended.append(found.compaction_id)
    return ended


def _is_dead(found: Compaction, killed_after_s: float) -> bool:
    if time.time() - found.updated_at >= killed_after_s:
        return True
    return found.host == socket.gethostname() and not _runs_here(found.pid)


def _runs_here(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _undo(output: str, found: Compaction) -> None:
    for table in TABLE_SCHEMAS:
        for uri in storage.list_files(storage.join(output, table)):
            if found.wrote(uri):
                storage.delete(uri)
    storage.delete(found.uri(output))


def _finish(output: str, found: Compaction) -> None:
    for _ in each(storage.delete, (storage.join(output, name) for name in found.replaced)):
        pass
    done = found._replace(state="done", replaced=[])
    _write(output, done)
    storage.delete(found.uri(output))


def _write(output: str, record: Compaction) -> None:
    storage.write_atomic(
        record.uri(output), json.dumps({**record._asdict(), "dropped": dict(record.dropped)}, indent=1).encode()
    )


def compact(
    output: str,
    *,
    file_mib: int = DEFAULT_FILE_MIB,
    only_latest: bool = False,
    include_unfinished: bool = False,
    killed_after_s: float = TAKEN_FOR_KILLED_S,
) -> Compacted:
    """Rewrites the small files of each table and partition as few, sorted by recording.

    Files that another run adds meanwhile are not touched. Memory holds the keys of one table and a row group; the
    rows go through a temporary file.

    Args:
        output: Folder of the tables.
        file_mib: About how large a new file is; those of half of it and more stay as they are, unless they have rows
            to drop.
        only_latest: Drop what no longer holds, too.
        include_unfinished: Also files of runs that have left no record: right only where none is still running.
        killed_after_s: As for `recover`.

    Raises:
        CompactError: Another compaction is at work.
        Rejected, StorageError: The output cannot be read or written; what was written is undone by the next one.
    """
    output = storage.canonical(output)
    recovered = recover(output, killed_after_s=killed_after_s)
    temporary = _remove_temporary(output)
    work = _Compaction(output, _begin(output), file_mib << 20)
    try:
        result = work.write(only_latest, include_unfinished)
    except BaseException:
        _undo(output, work.record)
        raise
    work.commit()  # an error from here on leaves the record to say which files hold
    return result._replace(recovered=len(recovered), temporary=temporary)


def _begin(output: str) -> Compaction:
    """Leaves the record, and looks for another's only then: of two that begin at once, none goes on alone unseen."""
    record = Compaction(new_run_id(), "writing", time.time(), socket.gethostname(), os.getpid())
    _write(output, record)
    others = [found for found in open_compactions(output) if found.compaction_id != record.compaction_id]
    if others:
        storage.delete(record.uri(output))
        other = others[0]
        raise CompactError(
            f"{output} is being compacted by process {other.pid} on {other.host}, which last wrote "
            f"{(time.time() - other.updated_at) / 60:.0f} min ago. Wait for it; if it was killed, it is undone once "
            f"it has not written for {TAKEN_FOR_KILLED_S / 60:.0f} min"
        )
    return record


def _remove_temporary(output: str) -> int:
    """Removes what killed writes left beside local files; see `storage.write_atomic`."""
    if "://" in output:
        return 0  # a store gets one PUT
    before = (datetime.now(timezone.utc) - _TEMPORARY_FOR).isoformat()
    old = [
        info.uri
        for info in storage.find_files(output)
        if storage.name(info.uri).startswith(".") and info.uri.endswith(".tmp") and (info.mtime or before) < before
    ]
    for uri in old:
        storage.delete(uri)
    return len(old)


class _Compaction:
    """One compaction at work; `record` is what its own file says."""

    def __init__(self, output: str, record: Compaction, file_bytes: int) -> None:
        self.record = record
        self._output = output
        self._file_bytes = file_bytes
        self._replaced: list[str] = []
        self._new: list[str] = []
        self._rows = self._duplicates = self._differing = self._superseded = 0
        self._dropped: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))

    def write(self, only_latest: bool, include_unfinished: bool) -> Compacted:
        """Writes the new files, which nobody reads yet."""
        files = table_files(self._output)
        runs = storage.list_files(storage.join(self._output, "_runs"))
        finished = {storage.name(uri).removesuffix(".json") for uri in runs}
        touched = {
            table: [info for info in infos if include_unfinished or _run_of(info.uri) in {None, *finished}]
            for table, infos in files.items()
        }
        left_alone = sum(map(len, files.values())) - sum(map(len, touched.values()))
        views = [Latest(self._output, touched)] if only_latest else []
        if only_latest and left_alone:
            # What holds as long as the unfinished runs come to nothing, and what holds with their rows.
            views.append(Latest(self._output, files))
        for table in TABLE_SCHEMAS:
            for part in self._plan(table, touched[table], views):
                self._rewrite(part)
                self._replaced += [info.uri.removeprefix(storage.join(self._output, "")) for info in part.files]
        there = {uri for table in TABLE_SCHEMAS for uri in storage.list_files(storage.join(self._output, table))}
        if not there.issuperset(self._new):
            raise CompactError(
                "another process took this compaction for killed and undid it; nothing is lost: "
                "run `af3pipe compact` again"
            )
        return Compacted(
            compaction_id=self.record.compaction_id if self._replaced else None,
            files_before=len(self._replaced),
            files_after=len(self._new),
            rows=self._rows,
            duplicates=self._duplicates,
            differing=self._differing,
            superseded=self._superseded,
            left_alone=left_alone,
            recovered=0,
            temporary=0,
        )

    def commit(self) -> None:
        """From one PUT on the new files are read and no longer the old ones, which are then deleted."""
        if not self._replaced:
            storage.delete(self.record.uri(self._output))
            return
        dropped = {
            run: {what: dict(counts) for what, counts in found.items()} for run, found in self._dropped.items()
        }
        self._update(state="committed", replaced=self._replaced, dropped=dropped)
        _finish(self._output, self.record)

    def _update(self, **changes: Any) -> None:
        self.record = self.record._replace(updated_at=time.time(), **changes)
        _write(self._output, self.record)

    def _plan(self, table: str, files: list[ObjectInfo], views: list[Latest]) -> list[Part]:
        """What of a table is to be rewritten, folder by folder."""
        category = _CATEGORY.get(table)
        keys = read_keys(files, table, ["recording_id", *([category] if category else [])])
        identity = codes(keys["identity"])
        unique = newest(identity, keys)
        holds = np.ones(len(keys), bool)
        if views:
            holds = np.any([_masks_of(view, table, files) for view in views], axis=0)
        kept = unique & holds
        self._duplicates += int((~unique).sum())
        self._superseded += int((unique & ~holds).sum())
        self._count_dropped(table, keys, identity, kept)
        masks = split(kept, keys, len(files))
        if table in ANSWER_TABLES:
            self._differing += _differing(files, split(_repeated(identity), keys, len(files)), identity)
        numbers = keys["file"].to_numpy()
        by_folder: dict[str, list[int]] = defaultdict(list)
        for number, info in enumerate(files):
            by_folder[storage.parent(info.uri)].append(number)
        parts: list[Part] = []
        for folder, members in by_folder.items():
            chosen = [
                number
                for number in members
                if (files[number].size_bytes or 0) < self._file_bytes // 2 or not masks[number].all()
            ]
            if len(chosen) < 2 and all(masks[number].all() for number in chosen):
                continue
            rows = keys.filter(pa.array(kept & np.isin(numbers, chosen)))
            parts.append(
                Part(
                    table,
                    folder,
                    [files[number] for number in chosen],
                    [masks[number] for number in chosen],
                    places_of(rows),
                    not kept.any() and not parts,
                )
            )
        return parts

    def _count_dropped(self, table: str, keys: pa.Table, identity: npt.NDArray[np.int32], kept: Mask) -> None:
        """By run, so that its record can still be held against the rows; a row that the run has twice counts not."""
        runs = keys["run_id"].combine_chunks()
        pairs = identity.astype(np.int64) * (len(runs.dictionary) + 1) + np.asarray(runs.indices)
        lost, first = np.unique(pairs[~kept], return_index=True)
        first = np.flatnonzero(~kept)[first][~np.isin(lost, pairs[kept])]
        if not len(first):
            return
        gone = keys.take(pa.array(first))
        category = _CATEGORY.get(table)
        what = "answers" if category is None else table
        names = gone[category].to_pylist() if category else [table] * len(gone)
        for run_id, name in zip(gone["run_id"].to_pylist(), names, strict=True):
            self._dropped[run_id][what][name] += 1

    def _rewrite(self, part: Part) -> None:
        """Sorts the rows that stay by way of a temporary file, and writes them."""
        buffer, writer, count = pa.BufferOutputStream(), None, 0
        with tempfile.TemporaryDirectory(prefix="af3pipe-compact-") as folder:
            spill = SortedRows(Path(folder, "rows"), part)
            for rows in spill.groups():
                if writer is None:
                    writer = pq.ParquetWriter(buffer, spill.schema, compression="zstd")
                writer.write_table(rows, row_group_size=len(rows))
                count += len(rows)
                if buffer.tell() >= self._file_bytes:
                    writer.close()
                    self._put(part.folder, buffer.getvalue().to_pybytes())
                    buffer, writer = pa.BufferOutputStream(), None
        if not count and part.is_all:
            writer = pq.ParquetWriter(buffer, TABLE_SCHEMAS[part.table], compression="zstd")
        if writer is not None:
            writer.close()
            self._put(part.folder, buffer.getvalue().to_pybytes())
        self._rows += count

    def _put(self, folder: str, data: bytes) -> None:
        uri = storage.join(folder, self.record.file_name(len(self._new)))
        storage.write_atomic(uri, data)
        self._new.append(uri)
        self._update()


def _run_of(uri: str) -> str | None:
    """The run that wrote a file; None for a file that a compaction wrote."""
    name = storage.name(uri)
    if name.startswith("compacted-"):
        return None
    run = _RUN_WITH_PANE.match(name)
    return run[1] if run else name.rpartition("-")[0]


def _masks_of(view: Latest, table: str, files: list[ObjectInfo]) -> Mask:
    by_uri = dict(zip((info.uri for info in view.files[table]), view.masks(table), strict=True))
    return np.concatenate([np.zeros(0, bool), *(by_uri[info.uri] for info in files)])


def _repeated(identity: npt.NDArray[np.int32]) -> Mask:
    return np.bincount(identity)[identity] > 1 if len(identity) else np.zeros(0, bool)


def _differing(files: list[ObjectInfo], repeated: list[Mask], identity: npt.NDArray[np.int32]) -> int:
    """How many identities have rows of different text."""
    texts: list[pa.ChunkedArray] = []
    held = [(info, mask) for info, mask in zip(files, repeated, strict=True) if mask.any()]
    for number, first, rows in read_rows_of([info for info, _ in held], ["text"]):
        texts.append(rows["text"].filter(pa.array(held[number][1][first : first + len(rows)])))
    if not texts:
        return 0
    found = pa.table(
        {
            "identity": identity[np.concatenate(repeated)],
            "text": pa.chunked_array([chunk for text in texts for chunk in text.chunks], pa.string()),
        }
    )
    counted = found.group_by("identity").aggregate([("text", "count_distinct")])
    return int(pc.sum(pc.greater(counted["text_count_distinct"], 1)).as_py() or 0)
