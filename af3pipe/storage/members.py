"""Opens audio that is inside other objects, by URIs of its own, for `storage.open_input` and `storage.stat`.

    s3://b/shard-000.tar#offset=1536&size=99&name=clip%201.flac      bytes of a tar shard or an Arrow stream
    data/train-00000.parquet#row=17&column=audio&name=clip.flac      a cell of a Parquet file

The name comes last, quoted, so that such a URI ends like the file's: decoders tell headerless formats by that.
Anything that differs from this in one character is an ordinary name with a `#` in it.
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
_TAR_SIZE_FIELD = 8 << 30  # from here on the size stands elsewhere, too
_RUN_BYTES = 128 << 20
_HELD_BYTES = 256 << 20
_MOST_RUNS = 64
_ROWS_AT_ONCE = 16


class Span(NamedTuple):
    """Bytes of a tar shard or an Arrow stream.

    Attributes:
        container: URI of the shard.
        offset: Of the first byte, from the shard's beginning.
        size_bytes: Of the member.
        name: What the member is called there; may be empty, and may hold folders.
    """

    container: str
    offset: int
    size_bytes: int
    name: str = ""

    @property
    def uri(self) -> str:
        """The URI that opens it."""
        return f"{self.container}#offset={self.offset}&size={self.size_bytes}{_name(self.name)}"


class Cell(NamedTuple):
    """The audio in a row of a Parquet file.

    Attributes:
        container: URI of the file.
        row: From 0, over the whole file.
        column: A struct with a child `bytes`.
        name: What its child `path` says; may be empty.
    """

    container: str
    row: int
    column: str
    name: str = ""

    @property
    def uri(self) -> str:
        """The URI that opens it."""
        return f"{self.container}#row={self.row}&column={_quoted(self.column)}{_name(self.name)}"


def _name(name: str) -> str:
    return f"&name={_quoted(name)}" if name else ""


def _quoted(name: str) -> str:
    return quote(name, safe="", errors="surrogateescape")


def _unquoted(name: str | None) -> str:
    return unquote(name or "", errors="surrogateescape")


def parse(uri: str) -> Span | Cell | None:
    """Returns the member of a container that a URI names; None for any other URI."""
    found: Span | Cell | None = None
    if match := _SPAN.fullmatch(uri):
        found = Span(match[1], int(match[2]), int(match[3]), _unquoted(match[4]))
    elif match := _CELL.fullmatch(uri):
        found = Cell(match[1], int(match[2]), _unquoted(match[3]), _unquoted(match[4]))
    return found if found is not None and found.uri == uri else None


def find(uri: str) -> Span | Cell | None:
    """Returns what `parse` does, but None where an object has this very name.

    A local file of this very name goes first. On a store, where to ask for each would double the requests, it does
    so only where there is no such shard; that is asked once per shard and process.
    """
    member = parse(uri)
    if member is None:
        return None
    if "://" not in uri:
        return None if is_file(uri) else member
    try:
        _check_exists(member.container)
    except Rejected as rejected:
        return None if rejected.reason is Reason.NOT_FOUND else member  # who may not ask may yet read
    return member


def is_file(uri: str) -> bool:
    """Returns whether a local file has this very name, `#` and all. A name too long for a file is none's."""
    return "://" not in uri and os.path.lexists(expanded(uri))


@functools.lru_cache(1024)
def _check_exists(container: str) -> None:
    storage.stat(container)


def identity(container: "storage.ObjectInfo") -> str:  # storage imports this module, too
    """Returns the `etag` of everything in a shard: the shard's, else its size and modification time."""
    return container.etag or f"{container.size_bytes}:{container.mtime}"


def stat(member: Span | Cell) -> "storage.ObjectInfo":
    """Returns the size of a member, and etag and time of its shard. Raises as `open_member`."""
    info = storage.stat(member.container)
    etag = identity(info)
    size_bytes = member.size_bytes if isinstance(member, Span) else _cells.read(member, info).size
    canonical = member._replace(container=info.canonical).uri
    return storage.ObjectInfo(member.uri, size_bytes, etag, info.mtime, canonical)


def open_member(member: Span | Cell) -> BinaryIO:
    """Opens a member for reading: a span by reading its range, a cell out of the rows around it, which are held.

    Raises:
        Rejected: As `storage.open_input` of the shard; not_found where the shard holds no such member.
    """
    if isinstance(member, Cell):
        return io.BytesIO(_cells.read(member).to_pybytes())
    return _open_span(member, storage.ObjectInfo(member.container, None, None, None))


def open_member_version(member: Span | Cell, listed: "storage.ObjectInfo") -> VersionedFile:
    """Opens a member of the shard that was listed. Raises as `open_member` and `storage.open_version`."""
    if isinstance(member, Span):
        return _open_span(member, shard_of(listed, member.container))
    cell = _cells.read(member, shard_of(listed, member.container) if listed.etag else None)
    return VersionedFile(cast(io.RawIOBase, io.BytesIO(cell.to_pybytes())), FIRST_BYTES, lambda: None)


def shard_of(listed: "storage.ObjectInfo", container: str) -> "storage.ObjectInfo":
    """Returns what is known of a shard from one of its members: `identity` is undone."""
    etag, size_bytes = listed.etag, None
    if etag is not None and (size := etag.removesuffix(f":{listed.mtime}")) != etag:
        etag, size_bytes = None, int(size) if size.isdigit() else None
    return storage.ObjectInfo(container, size_bytes, etag, listed.mtime)


def _open_span(member: Span, shard: "storage.ObjectInfo") -> VersionedFile:
    is_tar = member.container.lower().endswith(".tar")
    # A member's header is the block before it, and comes with the same request.
    before = _TAR_BLOCK_BYTES if is_tar and member.offset >= _TAR_BLOCK_BYTES else 0
    fs, path = locate(member.container)
    # Nothing is read ahead beyond its end.
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
    """A shard that was written anew would be heard somewhere in the middle."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        is_there = info.isreg() and (info.size == member.size_bytes or member.size_bytes >= _TAR_SIZE_FIELD)
    except tarfile.TarError:
        is_there = False
    if not is_there or member.offset < _TAR_BLOCK_BYTES:
        raise _not_found(
            f"{member.container} holds no member of {member.size_bytes} bytes at byte {member.offset}. "
            "Was it written anew? Then list it again."
        )


class _Part(io.RawIOBase):
    """A range of a file, as a file."""

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
    """Consecutive cells of a column, held in memory."""

    container: str
    etag: str | None
    column: str
    first: int
    cells: list[Any]  # pa.Buffer, or None
    size_bytes: int

    def holds(self, cell: Cell) -> bool:
        is_its_column = (self.container, self.column) == (cell.container, cell.column)
        return is_its_column and self.first <= cell.row < self.first + len(self.cells)


class _Cells:
    """Cells of Parquet files, with the rows around them: a page can only be read from its row group's beginning.

    Threads share what was read last, up to 256 MiB, so that rows read in order cost each row group one read; of a
    row group beyond 128 MiB, one read each 128 MiB. One is read at a time, or memory would know no bound.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []  # the one used last at the end
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    def read(self, cell: Cell, shard: "storage.ObjectInfo | None" = None) -> Any:
        """Returns a cell's bytes as a `pa.Buffer`; where the file is given as it was listed, only of that version.

        Raises:
            Rejected: not_found, decode_error; with a shard, changed; and as reading the file.
        """
        etag = identity(shard) if shard else None
        run = self._held(cell, etag)
        if run is None:
            with self._reading:
                run = self._held(cell, etag)  # by now another thread may have read it
                if run is None:
                    run = _read_run(cell, shard)
                    self._hold(run)
        found = run.cells[cell.row - run.first]
        if found is None:
            raise _not_found(f"Row {cell.row} of {cell.container} holds no bytes in column {cell.column!r}.")
        return found

    def _held(self, cell: Cell, etag: str | None) -> _Run | None:
        with self._lock:
            run = next((run for run in self._runs if run.holds(cell)), None)
            if run is None:
                return None
            self._runs.remove(run)
            if etag not in (None, run.etag):  # the file has changed
                return None
            self._runs.append(run)
            return run

    def _hold(self, run: _Run) -> None:
        with self._lock:
            self._runs.append(run)
            while len(self._runs) > 1 and (
                len(self._runs) > _MOST_RUNS or sum(held.size_bytes for held in self._runs) > _HELD_BYTES
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
    """The rest of a row group from its beginning, or of a large one from the row that is wanted."""
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
