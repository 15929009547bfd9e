"""Rewrites many small Parquet files of an output into a few sorted ones in the current format, without duplicates."""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.storage import ObjectInfo
from af3pipe.tables.compaction import (
    DEAD_AFTER_S,
    CompactError,
    begin,
    commit,
    prune,
    recover,
    taken_for_dead,
    undo,
)
from af3pipe.tables.compaction_record import Compaction, identity
from af3pipe.tables.formats import with_format
from af3pipe.tables.heartbeat import Heartbeat, is_undone
from af3pipe.tables.keys import Hashes, Keys, KeySet, Mask, hashes_of, named_keys, read_keys
from af3pipe.tables.latest import Latest
from af3pipe.tables.layout import FORMAT, TABLE_SCHEMAS
from af3pipe.tables.reader import possible_runs, read_rows_of, table_files
from af3pipe.tables.sort import Part, SortedRows

__all__ = ["DEFAULT_FILE_MIB", "CompactError", "Compacted", "compact", "recover"]

DEFAULT_FILE_MIB = 128
_TEMPORARY_FOR = timedelta(days=1)
_CATEGORY = {"recordings": "terminal_state", "dead_letters": "reason"}


class Compacted(NamedTuple):
    """Reports what a compaction did.

    Attributes:
        compaction_id: Its id; None if there was nothing to do.
        files_before: Number of files that were read and replaced.
        files_after: Number of files that were written instead.
        rows: Number of rows in the new files.
        duplicates: Rows dropped because a newer row has the same identity.
        differing: Identities whose copies had different texts.
        superseded: Rows dropped because they are not in the latest view.
        left_alone: Files skipped because their run has not finished.
        recovered: Killed compactions that this call finished or undid.
        temporary: Temporary files of killed writes that were deleted.
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


def compact(
    output: str,
    *,
    file_mib: int = DEFAULT_FILE_MIB,
    only_latest: bool = False,
    include_unfinished: bool = False,
    dead_after_s: float = DEAD_AFTER_S,
) -> Compacted:
    """Merges the small files of each table and partition into a few sorted ones; rewrites all files of older formats.

    Files that a run writes meanwhile are not touched. Memory use: hashes of the keys of one table and about two row
    groups; the rows pass through a temporary file.

    Args:
        output: Folder of the tables.
        file_mib: Target file size in MiB. Files of at least half this size are not rewritten, unless they have rows
            to drop or an older format.
        only_latest: Whether to drop rows that are not in the latest view, too.
        include_unfinished: Whether to rewrite files of runs without a run record, too. Safe only if none of these
            runs is still running.
        dead_after_s: See `recover`.

    Raises:
        CompactError: Another compaction is running, or a run references rows that would be dropped; nothing changed.
        Rejected, NotATable, StorageError: The output cannot be read or written; nothing changed, or the next
            compaction finishes this one.
    """
    output = storage.canonical(output)
    recovered = recover(output, dead_after_s=dead_after_s)
    temporary = _remove_temporary(output)
    record = begin(output)
    with Heartbeat(output, record) as heartbeat:
        try:
            prune(output)
            work = _Compaction(output, record, file_mib << 20, heartbeat)
            result = work.write(only_latest, include_unfinished)
        except BaseException:
            undo(output, record)
            raise
        if work.replaced:  # an error in here leaves the record to say which files are current
            commit(output, record, work.replaced, work.new, work.dropped)
        else:
            undo(output, record)
    return result._replace(recovered=len(recovered), temporary=temporary)


def _remove_temporary(output: str) -> int:
    """Deletes temporary files of killed writes (`storage.write_atomic`) from a local output; returns their number."""
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
    """Writes the new files of a compaction; readers ignore them until it commits.

    Attributes:
        replaced: As of the compaction's record, as `new` and `dropped` are.
    """

    def __init__(self, output: str, record: Compaction, file_bytes: int, heartbeat: Heartbeat) -> None:
        self.replaced: dict[str, str] = {}
        self.new: list[str] = []
        self.dropped: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        self._output = output
        self._record = record
        self._file_bytes = file_bytes
        self._heartbeat = heartbeat
        self._below = len(storage.join(output, ""))
        self._superseded: dict[str, list[Hashes]] = {"answer_keys": [], "dead_letter_keys": []}
        self._rows = self._duplicates = self._differing = self._superseded_rows = 0

    def write(self, only_latest: bool, include_unfinished: bool) -> Compacted:
        """Writes all new files and returns the counts."""
        runs = {storage.name(uri) for uri in storage.list_files(storage.join(self._output, "_runs"))}
        files = table_files(self._output)
        touched = {
            table: [info for info in infos if include_unfinished or _is_finished(info.uri, runs)]
            for table, infos in files.items()
        }
        left_alone = sum(map(len, files.values())) - sum(map(len, touched.values()))
        views = [Latest(self._output, touched)] if only_latest else []
        if only_latest and left_alone:
            # The view without the rows of unfinished runs, and the view with them: rows of either are kept.
            views.append(Latest(self._output, files))
        for table in TABLE_SCHEMAS:
            for part in self._plan(table, touched[table], views):
                self._rewrite(part)
                self.replaced |= {info.uri[self._below :]: identity(info) for info in part.files}
        self._check_unused(files["recordings"])
        self._check_new()
        return Compacted(
            compaction_id=self._record.compaction_id if self.replaced else None,
            files_before=len(self.replaced),
            files_after=len(self.new),
            rows=self._rows,
            duplicates=self._duplicates,
            differing=self._differing,
            superseded=self._superseded_rows,
            left_alone=left_alone,
            recovered=0,
            temporary=0,
        )

    def _check_unused(self, listed: Sequence[ObjectInfo]) -> None:
        """Raises CompactError if a run that wrote meanwhile references rows that are about to be dropped."""
        known = {(info.uri, identity(info)) for info in listed}
        since = table_files(self._output, ["recordings"])["recordings"]
        since = [info for info in since if (info.uri, identity(info)) not in known]
        for column, dropped in self._superseded.items():
            if not (since and dropped):
                continue
            gone = KeySet(np.concatenate(dropped))
            if any(gone.has(named.hashes).any() for named in named_keys(since, column)):
                raise CompactError(
                    f"{since[0].uri} was written meanwhile, and references rows that --latest would have dropped; "
                    "run `af3pipe compact` again"
                )

    def _check_new(self) -> None:
        there = {uri for table in TABLE_SCHEMAS for uri in storage.list_files(storage.join(self._output, table))}
        if not all(storage.join(self._output, name) in there for name in self.new):
            raise taken_for_dead()

    def _plan(self, table: str, files: list[ObjectInfo], views: list[Latest]) -> list[Part]:
        """Returns the files of a table to rewrite, grouped by folder."""
        keys = read_keys(files, table, _CATEGORY.get(table, "run_id"))
        codes = KeySet(keys.identity).codes
        unique = keys.newest(codes)
        current = np.ones(len(keys), bool)
        if views:
            current = np.any([_mask_of(view, table, files) for view in views], axis=0)
        kept = unique & current
        self._duplicates += int((~unique).sum())
        self._superseded_rows += int((unique & ~current).sum())
        if views and table != "recordings":
            column = "answer_keys" if table in ANSWER_TABLES else "dead_letter_keys"
            self._superseded[column].append(keys.identity[unique & ~current])
        self._count_dropped(table, keys, codes, kept)
        masks = keys.split(kept)
        if table in ANSWER_TABLES:
            self._differing += _differing(files, keys.split(_repeated(codes)), codes)
        by_folder: dict[str, list[int]] = defaultdict(list)
        for number, info in enumerate(files):
            if (
                (info.size_bytes or 0) < self._file_bytes // 2
                or keys.formats[number] < FORMAT
                or not masks[number].all()
            ):
                by_folder[storage.parent(info.uri)].append(number)
        chosen = {
            folder: numbers
            for folder, numbers in by_folder.items()
            if len(numbers) > 1 or keys.formats[numbers[0]] < FORMAT or not masks[numbers[0]].all()
        }
        samples = _samples(keys, kept, {number: folder for folder, numbers in chosen.items() for number in numbers})
        return [
            Part(
                table,
                folder,
                [files[number] for number in numbers],
                [masks[number] for number in numbers],
                sorted(samples[folder]),
                is_all=not kept.any() and at == 0,
            )
            for at, (folder, numbers) in enumerate(chosen.items())
        ]

    def _count_dropped(self, table: str, keys: Keys, codes: npt.NDArray[np.integer], kept: Mask) -> None:
        """Counts dropped rows by run, for its audit; rows of which the same run keeps a copy are not counted."""
        pairs = codes.astype(np.int64) * (len(keys.runs.texts) + 1) + keys.runs.codes
        lost, first = np.unique(pairs[~kept], return_index=True)
        first = np.flatnonzero(~kept)[first][~np.isin(lost, pairs[kept])]
        what = "answers" if table in ANSWER_TABLES else table
        found = Counter(zip(keys.runs.codes[first].tolist(), keys.categories.codes[first].tolist(), strict=True))
        for (run, category), count in found.items():
            name = keys.categories.texts[category] if table in _CATEGORY else table
            self.dropped[keys.runs.texts[run]][what][name] += count

    def _rewrite(self, part: Part) -> None:
        """Sorts the kept rows with a temporary file and writes them to new files."""
        buffer, writer, count = pa.BufferOutputStream(), None, 0
        with tempfile.TemporaryDirectory(prefix="af3pipe-compact-") as folder:
            try:
                spill = SortedRows(Path(folder, "rows"), part)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise CompactError(f"the files of {part.folder} have different columns: {error}") from error
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
            writer = pq.ParquetWriter(buffer, with_format(TABLE_SCHEMAS[part.table]), compression="zstd")
        if writer is not None:
            writer.close()
            self._put(part.folder, buffer.getvalue().to_pybytes())
        self._rows += count

    def _put(self, folder: str, data: bytes) -> None:
        if self._heartbeat.lost.is_set() or is_undone(self._output, self._record):
            raise taken_for_dead()
        uri = storage.join(folder, self._record.file_name(len(self.new)))
        storage.write_atomic(uri, data)
        self.new.append(uri[self._below :])


def _is_finished(uri: str, runs: set[str]) -> bool:
    """Returns whether a file was written by a run with a run record, or by a compaction.

    Args:
        uri: The file.
        runs: Names of the files in `_runs/`.
    """
    candidates = possible_runs(uri)
    known = [run for run in candidates if f"{run}.json" in runs or f"{run}.started.json" in runs]
    return not candidates or (bool(known) and f"{known[0]}.json" in runs)


def _samples(keys: Keys, kept: Mask, folders: Mapping[int, str]) -> dict[str, list[str]]:
    """Samples `recording_id`s of the kept rows, by folder; `folders` maps the index of a file to its folder."""
    found: dict[str, list[str]] = defaultdict(list)
    numbers = np.searchsorted(np.cumsum(keys.counts), keys.sampled, side="right")
    for number, stays, name in zip(numbers.tolist(), kept[keys.sampled].tolist(), keys.sampled_ids, strict=True):
        if stays and number in folders:
            found[folders[number]].append(name)
    return found


def _mask_of(view: Latest, table: str, files: list[ObjectInfo]) -> Mask:
    by_uri = dict(zip((info.uri for info in view.files[table]), view.masks(table), strict=True))
    return np.concatenate([np.zeros(0, bool), *(by_uri[info.uri] for info in files)])


def _repeated(codes: npt.NDArray[np.integer]) -> Mask:
    return np.bincount(codes)[codes] > 1 if len(codes) else np.zeros(0, bool)


def _differing(files: list[ObjectInfo], repeated: list[Mask], codes: npt.NDArray[np.integer]) -> int:
    """Counts the identities whose rows differ in their text."""
    copies = [(info, mask) for info, mask in zip(files, repeated, strict=True) if mask.any()]
    texts = [np.zeros((0, 2), np.uint64)]
    for number, first, rows in read_rows_of([info for info, _ in copies], "captions", ["text"]):
        texts.append(hashes_of(rows["text"].filter(pa.array(copies[number][1][first : first + len(rows)]))))
    if not copies:
        return 0
    text_codes = KeySet(np.concatenate(texts)).codes.astype(np.int64)
    identities = codes[np.concatenate(repeated)].astype(np.int64)
    pairs = np.unique(identities * (int(text_codes.max()) + 1) + text_codes)
    return int((np.unique(pairs // (int(text_codes.max()) + 1), return_counts=True)[1] > 1).sum())
