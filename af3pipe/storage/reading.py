"""Reads that go on where the store failed, and that know where the end is."""

import errno
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from af3pipe.schemas import Stage
from af3pipe.storage.retry import retried
from af3pipe.storage.stores import info, is_local, not_missing, protocols

BLOCK_BYTES = 1 << 20
FIRST_BYTES = 1 << 16
_MOST_AHEAD_BYTES = 1 << 22
_STREAMS_IN_MEMORY_BYTES = 64 << 20
_BUCKETS = frozenset({"s3", "gs"})


def open_raw(fs: Any, path: str, uri: str, size_bytes: int | None) -> Any:
    """A handle that can be sought and read, unbuffered, as the store's client has it. Raises as `retried`."""
    if is_local(fs):
        return retried(lambda: Path(path).open("rb", buffering=0), uri, Stage.READ)
    if is_bucket(fs):
        return _Ranges(fs, path, size_bytes or int(info(fs, path, uri, Stage.READ)["size"]))
    return retried(lambda: not_missing(fs, lambda: _open(fs, path, size_bytes)), uri, Stage.READ)


def is_bucket(fs: Any) -> bool:
    """Whether it is a store that is best read by ranges, by its own client's plainest call."""
    return bool(_BUCKETS.intersection(protocols(fs)))


class _Ranges:
    """An object of known size, each read of which is one request. The clients' own files ask for the size again."""

    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs = fs
        self._path = path
        self.size = size
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += self.size
        if offset < 0:
            raise ValueError(f"negative seek position {offset}")
        self._position = offset
        return offset

    def read(self, size: int) -> bytes:
        end = min(self._position + size, self.size)
        if end <= self._position:
            return b""
        data = bytes(self._fs.cat_file(self._path, start=self._position, end=end))
        self._position += len(data)
        return data

    def close(self) -> None:
        pass


def _open(fs: Any, path: str, size_bytes: int | None) -> Any:
    handle = fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none")
    if isinstance(handle, io.BytesIO):
        # The memory store hands out its own object, whose position all readers would share.
        return io.BytesIO(handle.getbuffer())
    if handle.seekable():
        return handle
    copy = tempfile.SpooledTemporaryFile(_STREAMS_IN_MEMORY_BYTES)  # noqa: SIM115  (the caller closes it)
    with handle:  # a web server that knows no ranges
        shutil.copyfileobj(handle, copy, BLOCK_BYTES)
    if size_bytes and copy.tell() < size_bytes:
        raise _cut_off(copy.tell(), size_bytes)
    copy.seek(0)
    return copy


def _cut_off(found: int, size_bytes: int) -> OSError:
    return OSError(errno.EIO, f"it has {size_bytes} bytes by the store's account, and ended after {found}")


class RetriedReads(io.RawIOBase):
    """A file whose reads are tried again, each from where it began, and which reads ahead."""

    def __init__(self, handle: Any, uri: str) -> None:
        self._handle = handle
        self._uri = uri
        size = getattr(handle, "size", None)
        self._size = size if isinstance(size, int) else None
        self._position = 0
        self._held = b""
        self._held_from = 0
        self._ahead_bytes = FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        if not isinstance(self._handle, io.FileIO):  # asking others may have them write to a disk what is in memory
            raise io.UnsupportedOperation("fileno")
        return self._handle.fileno()

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:  # the handle stands elsewhere: it has read ahead
            offset, whence = self._position + offset, io.SEEK_SET
        self._position = int(self._handle.seek(offset, whence))
        return self._position

    def readinto(self, buffer: Any) -> int:
        if not self._held_from <= self._position < self._held_from + len(self._held):
            self._fetch(len(buffer))
        start = self._position - self._held_from
        data = self._held[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, wanted: int) -> None:
        goes_on = self._held and self._position == self._held_from + len(self._held)
        self._ahead_bytes = min(4 * self._ahead_bytes, _MOST_AHEAD_BYTES) if goes_on else FIRST_BYTES
        size = max(wanted, self._ahead_bytes)
        self._held = retried(lambda: self._read(size), self._uri, Stage.READ)
        self._held_from = self._position

    def _read(self, size: int) -> bytes:
        # After a failed read the handle may stand anywhere.
        if self._handle.tell() != self._position:
            self._handle.seek(self._position)
        data = bytes(self._handle.read(size))
        # A server that closes early must not pass for the end of the file. Less than was asked for is no harm: what
        # is missing is asked for next.
        if not data and size and self._size is not None and self._position < self._size:
            raise _cut_off(self._position, self._size)
        return data

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()
