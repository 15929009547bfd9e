"""Opens audio files inside tar shards, Arrow streams and Parquet files, addressed by URIs with a `#` part.

    s3://b/shard-000.tar#offset=1536&size=99&name=clip%201.flac      bytes of a tar shard or an Arrow stream
    data/train-00000.parquet#row=17&column=audio&name=clip.flac      a cell of a Parquet file

The name comes last, percent-encoded, so that the URI keeps the file's extension, by which decoders recognise
headerless formats. A URI that does not match these forms exactly is an ordinary name with a `#` in it.
"""

import functools
import io
import os
import re
import tarfile
import threading
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote, unquote

import pyarrow as pa

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.names import expanded
from af3pipe.storage.parquet import ParquetFile
from af3pipe.storage.reading import FIRST_BYTES, RetriedReads, open_raw
from af3pipe.storage.stores import locate
from af3pipe.storage.versions import VersionedFile, version_check

_SPAN = re.compile(r"(.+\.(?:tar|arrow))#offset=(\d{1,19})&size=(\d{1,19})(?:&name=([^/#&]+))?", re.I | re.S)
_CELL = re.compile(r"(.+\.parquet)#row=(\d{1,19})&column=([^/#&]+)(?:&name=([^/#&]+))?", re.I | re.S)
_TAR_BLOCK_BYTES = 512
_TAR_SIZE_FIELD = 8 << 30  # sizes from here on are also written in another field
_RUN_BYTES = 128 << 20
_CACHE_BYTES = 256 << 20
_MOST_RUNS = 64
_ROWS_AT_ONCE = 16


class Span(NamedTuple):
    """A byte range of a tar shard or an Arrow stream.

    Attributes:
        container: URI of the shard.
        offset: Index of its first byte in the shard.
        size_bytes: Size of the member.
        name: Name of the member in the shard; may be empty, and may contain folders.
    """

    container: str
    offset: int
    size_bytes: int
    name: str = ""

    @property
    def uri(self) -> str:
        """The URI that opens this member."""
        return f"{self.container}#offset={self.offset}&size={self.size_bytes}{_name(self.name)}"


class Cell(NamedTuple):
    """A cell of a Parquet file that contains audio.

    Attributes:
        container: URI of the file.
        row: Index of the row in the whole file, from 0.
        column: Name of the column: a struct with a child `bytes`.
        name: Value of the child `path`; may be empty.
    """

    container: str
    row: int
    column: str
    name: str = ""

    @property
    def uri(self) -> str:
        """The URI that opens this cell."""
        return f"{self.container}#row={self.row}&column={_quoted(self.column)}{_name(self.name)}"


def _name(name: str) -> str:
    return f"&name={_quoted(name)}" if name else ""


def _quoted(name: str) -> str:
    return quote(name, safe="", errors="surrogateescape")


def _unquoted(name: str | None) -> str:
    return unquote(name or "", errors="surrogateescape")


def parse(uri: str) -> Span | Cell | None:
    """Parses the URI of a member of a container; returns None for any other URI."""
    found: Span | Cell | None = None
    if match := _SPAN.fullmatch(uri):
        found = Span(match[1], int(match[2]), int(match[3]), _unquoted(match[4]))
    elif match := _CELL.fullmatch(uri):
        found = Cell(match[1], int(match[2]), _unquoted(match[3]), _unquoted(match[4]))
    return found if found is not None and found.uri == uri else None


def find(uri: str) -> Span | Cell | None:
    """Parses a URI as `parse` does, but returns None if an object of exactly this name exists.

    A local file of this name takes precedence. On object stores, where checking each name would double the
    requests, it does so only if the shard does not exist, which is checked once per shard and process.
    """
    member = parse(uri)
    if member is None:
        return None
    if "://" not in uri:
        return None if is_file(uri) else member
    try:
        _check_exists(member.container)
    except Rejected as rejected:
        return None if rejected.reason is Reason.NOT_FOUND else member  # stat may be refused, reading allowed
    return member


def is_file(uri: str) -> bool:
    """Returns whether a local file has exactly this name, `#` included; False for names too long for a file."""
    return "://" not in uri and os.path.lexists(expanded(uri))


@functools.lru_cache(1024)
def _check_exists(container: str) -> None:
    storage.stat(container)


def identity(container: "storage.ObjectInfo") -> str:  # storage imports this module, too
    """Returns the `etag` for all members of a shard: the shard's own, or else its size and modification time."""
    return container.etag or f"{container.size_bytes}:{container.mtime}"


def stat(member: Span | Cell) -> "storage.ObjectInfo":
    """Returns the size of a member, with the etag and time of its shard. Raises as `open_member`."""
    info = storage.stat(member.container)
    etag = identity(info)
    size_bytes = member.size_bytes if isinstance(member, Span) else _cells.read(member, info).size
    canonical = member._replace(container=info.canonical).uri
    return storage.ObjectInfo(member.uri, size_bytes, etag, info.mtime, canonical)


def open_member(member: Span | Cell) -> BinaryIO:
    """Opens a member for reading: a span by a range read, a cell by reading (and caching) the rows around it.

    Raises:
        Rejected: As `storage.open_input` of the shard; not_found if the shard has no such member.
    """
    if isinstance(member, Cell):
        return io.BytesIO(_cells.read(member).to_pybytes())
    return _open_span(member, storage.ObjectInfo(member.container, None, None, None))


def open_member_version(member: Span | Cell, listed: "storage.ObjectInfo") -> VersionedFile:
    """Opens a member of the listed version of the shard. Raises as `open_member` and `storage.open_version`."""
    if isinstance(member, Span):
        return _open_span(member, shard_of(listed, member.container))
    cell = _cells.read(member, shard_of(listed, member.container) if listed.etag else None)
    return VersionedFile(cast(io.RawIOBase, io.BytesIO(cell.to_pybytes())), FIRST_BYTES, lambda: None)


def shard_of(listed: "storage.ObjectInfo", container: str) -> "storage.ObjectInfo":
    """Returns what a member's listing says about its shard; the inverse of `identity`."""
    etag, size_bytes = listed.etag, None
    if etag is not None and (size := etag.removesuffix(f":{listed.mtime}")) != etag:
        etag, size_bytes = None, int(size) if size.isdigit() else None
    return storage.ObjectInfo(container, size_bytes, etag, listed.mtime)


def _open_span(member: Span, shard: "storage.ObjectInfo") -> VersionedFile:
    is_tar = member.container.lower().endswith(".tar")
    # A member's header is the block before it, and comes with the same request.
    before = _TAR_BLOCK_BYTES if is_tar and member.offset >= _TAR_BLOCK_BYTES else 0
    fs, path = locate(member.container)
    # The size ends at the member, so that nothing behind it is read ahead.
    raw = open_raw(fs, path, member.container, member.offset + member.size_bytes, shard.etag)
    try:
        check = version_check(fs, path, shard, raw)
        part = _Part(raw, member.offset - before, member.size_bytes + before)
        file = VersionedFile(RetriedReads(part, member.container), FIRST_BYTES, check)
        if not is_tar:
            return file
        _check_tar_header(file.read(_TAR_BLOCK_BYTES), member)
        return VersionedFile(_Part(file, _TAR_BLOCK_BYTES, member.size_bytes), io.DEFAULT_BUFFER_SIZE, check)
    except BaseException:
        raw.close()
        raise


def _check_tar_header(block: bytes, member: Span) -> None:
    """Raises not_found if the member's tar header is missing: the shard was rewritten, so the range is wrong."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        is_there = info.isreg() and (info.size == member.size_bytes or member.size_bytes >= _TAR_SIZE_FIELD)
    except tarfile.TarError:
        is_there = False
    if not is_there or member.offset < _TAR_BLOCK_BYTES:
        raise _not_found(
            f"{member.container} has no member of {member.size_bytes} bytes at byte {member.offset}. "
            "If it was rewritten, list it again."
        )


class _Part(io.RawIOBase):
    """A byte range of a file, presented as a file."""

    def __init__(self, file: BinaryIO, start: int, size_bytes: int) -> None:
        self._file = file
        self._start = start
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self._size_bytes - self._position, 0))
        self._file.seek(self._start + self._position)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Run(NamedTuple):
    """Consecutive cells of a column, cached in memory."""

    container: str
    etag: str | None
    column: str
    first: int
    cells: list[Any]  # pa.Buffer, or None
    size_bytes: int

    def contains(self, cell: Cell) -> bool:
        is_its_column = (self.container, self.column) == (cell.container, cell.column)
        return is_its_column and self.first <= cell.row < self.first + len(self.cells)


class _Cells:
    """Reads cells of Parquet files, and caches the rows around them: a row group can only be read from its start.

    Threads share a cache of up to 256 MiB, so that reading rows in order reads each row group once (and row groups
    beyond 128 MiB in runs of 128 MiB). Only one thread reads at a time, which bounds the memory.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []  # the one used last at the end
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    def read(self, cell: Cell, shard: "storage.ObjectInfo | None" = None) -> Any:
        """Returns a cell's bytes as a `pa.Buffer`; if `shard` is given, only from that version of the file.

        Raises:
            Rejected: not_found, decode_error; changed, if `shard` is given; and what reading the file raises.
        """
        etag = identity(shard) if shard else None
        run = self._cached(cell, etag)
        if run is None:
            with self._reading:
                run = self._cached(cell, etag)  # by now another thread may have read it
                if run is None:
                    run = _read_run(cell, shard)
                    self._cache(run)
        found = run.cells[cell.row - run.first]
        if found is None:
            raise _not_found(f"Row {cell.row} of {cell.container} has no bytes in column {cell.column!r}.")
        return found

    def _cached(self, cell: Cell, etag: str | None) -> _Run | None:
        with self._lock:
            run = next((run for run in self._runs if run.contains(cell)), None)
            if run is None:
                return None
            self._runs.remove(run)
            if etag not in (None, run.etag):  # the file has changed
                return None
            self._runs.append(run)
            return run

    def _cache(self, run: _Run) -> None:
        with self._lock:
            self._runs.append(run)
            while len(self._runs) > 1 and (
                len(self._runs) > _MOST_RUNS or sum(kept.size_bytes for kept in self._runs) > _CACHE_BYTES
            ):
                del self._runs[0]


_cells = _Cells()


def _read_run(cell: Cell, shard: "storage.ObjectInfo | None") -> _Run:
    try:
        with storage.open_version(shard) if shard else storage.open_input(cell.container) as file:
            return _run(ParquetFile(file, buffer_size=1 << 20), cell, identity(shard) if shard else None)
    except (pa.ArrowException, OSError) as error:  # a damaged footer is an OSError to pyarrow
        detail = f"Row {cell.row} of {cell.container} cannot be read: {error}."
        raise Rejected(Stage.READ, Reason.DECODE_ERROR, detail) from error


def _run(parquet: ParquetFile, cell: Cell, etag: str | None) -> _Run:
    """Reads a row group from its start, or a large one from the wanted row on."""
    leaf = f"{cell.column}.bytes"
    paths = [parquet.schema.column(index).path for index in range(len(parquet.schema))]
    if leaf not in paths:
        raise _not_found(f"{cell.container} has no column {cell.column!r} with bytes in it.")
    first = 0
    for index in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(index)
        if cell.row < first + group.num_rows:
            break
        first += group.num_rows
    else:
        raise _not_found(f"{cell.container} has {first} rows, and none with the number {cell.row}, from 0.")
    is_large = group.column(paths.index(leaf)).total_uncompressed_size > _RUN_BYTES
    cells: list[Any] = []
    size_bytes = 0
    for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[index], columns=[leaf]):
        if is_large and first + len(batch) <= cell.row:
            first += len(batch)
            continue
        values = batch.column(0).field("bytes")
        cells += [value.as_buffer() for value in values]
        size_bytes += values.nbytes
        if is_large and size_bytes > _RUN_BYTES:
            break
    return _Run(cell.container, etag, cell.column, first, cells, size_bytes)


def _not_found(detail: str) -> Rejected:
    return Rejected(Stage.READ, Reason.NOT_FOUND, detail)
