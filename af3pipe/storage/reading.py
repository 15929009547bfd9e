"""Reads objects by byte ranges, with retries of each read, and detects early ends."""

import errno
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fsspec.asyn import sync

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.objects import object_info
from af3pipe.storage.retry import retried
from af3pipe.storage.stores import info, is_local, not_missing, protocols

BLOCK_BYTES = 1 << 20
FIRST_BYTES = 1 << 16
_MOST_AHEAD_BYTES = 1 << 22
_STREAMS_IN_MEMORY_BYTES = 64 << 20


def open_raw(fs: Any, path: str, uri: str, size_bytes: int | None, version: str | None = None) -> Any:
    """Opens an unbuffered, seekable handle with the store's own client.

    Args:
        fs: The file system.
        path: Path of the object, as the file system spells it.
        uri: URI of the object, for messages.
        size_bytes: Size, if known; saves a request.
        version: Etag or generation to read, in buckets. In S3 all reads are of one version in any case.

    Raises:
        Rejected: As `retried`; from reads, changed, too.
    """
    if is_local(fs):
        return retried(lambda: Path(path).open("rb", buffering=0), uri, Stage.READ)
    if not is_bucket(fs):
        return retried(lambda: not_missing(fs, lambda: _open(fs, path, size_bytes)), uri, Stage.READ)
    if not size_bytes:
        found = object_info(fs, info(fs, path, uri, Stage.READ), "")
        if version not in (None, found.etag):
            raise changed(uri)
        size_bytes, version = found.size_bytes or 0, found.etag
    return _S3Ranges(fs, path, uri, size_bytes, version) if is_s3(fs) else _Ranges(fs, path, uri, size_bytes, version)


def is_bucket(fs: Any) -> bool:
    """Returns whether a store is best read by range requests of its client."""
    return is_s3(fs) or "gs" in protocols(fs)


def is_s3(fs: Any) -> bool:
    """Returns whether a store speaks the S3 protocol."""
    return "s3" in protocols(fs)


def is_generation(version: str | None) -> bool:
    """Returns whether a version is a generation of Google Cloud Storage; some compatible servers have only etags."""
    return version is not None and version.isdigit()


def changed(uri: str, detail: str = "it no longer has the listed version") -> Rejected:  # see `retry.explained`
    """Returns the error for an object that is not, or no longer, the listed version."""
    return Rejected(Stage.READ, Reason.CHANGED, f"{uri} was replaced or modified after it was listed: {detail}.")


class _Ranges:
    """An object of known size; each read is one request. The clients' own files would request the size again."""

    def __init__(self, fs: Any, path: str, uri: str, size: int, version: str | None) -> None:
        self._fs = fs
        self._path = path
        self._uri = uri
        self._version = version
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
        data = self._get(self._position, end)
        self._position += len(data)
        return data

    def _get(self, start: int, end: int) -> bytes:
        generation = {"generation": self._version} if is_generation(self._version) else {}
        try:
            return bytes(self._fs.cat_file(self._path, start=start, end=end, **generation))
        except FileNotFoundError as error:  # where the bucket keeps no versions, the one that was replaced is gone
            if not generation:
                raise
            raise changed(self._uri) from error

    def close(self) -> None:
        pass


class _S3Ranges(_Ranges):
    """Range reads from S3 of one etag. s3fs cannot do that: its reads mix content from before and after a change."""

    def _get(self, start: int, end: int) -> bytes:
        etag, data = sync(self._fs.loop, self._ask, start, end)
        if self._version not in (None, etag):  # not every server knows If-Match
            raise changed(self._uri)
        self._version = etag
        return bytes(data)

    async def _ask(self, start: int, end: int) -> tuple[str | None, bytes]:
        bucket, key, version_id = self._fs.split_path(self._path)
        more = {"VersionId": version_id} if version_id else {}
        if self._version is not None:
            more["IfMatch"] = f'"{self._version}"'
        reply = await self._fs._call_s3(
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **more
        )
        try:
            return reply.get("ETag", "").strip('"') or None, await reply["Body"].read()
        finally:
            reply["Body"].close()


def _open(fs: Any, path: str, size_bytes: int | None) -> Any:
    handle = fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none")
    if isinstance(handle, io.BytesIO):
        # The memory store hands out its own object, whose position all readers would share.
        return io.BytesIO(handle.getbuffer())
    if handle.seekable():
        return handle
    copy = tempfile.SpooledTemporaryFile(_STREAMS_IN_MEMORY_BYTES)  # noqa: SIM115  (the caller closes it)
    with handle:  # a web server without range requests
        shutil.copyfileobj(handle, copy, BLOCK_BYTES)
    if size_bytes and copy.tell() < size_bytes:
        raise _cut_off(copy.tell(), size_bytes)
    copy.seek(0)
    return copy


def _cut_off(found: int, size_bytes: int) -> OSError:
    return OSError(errno.EIO, f"it has {size_bytes} bytes by the store's account, and ended after {found}")


class RetriedReads(io.RawIOBase):
    """A file that retries failed reads from where they began, and reads ahead."""

    def __init__(self, handle: Any, uri: str) -> None:
        self._handle = handle
        self._uri = uri
        size = getattr(handle, "size", None)
        self._size = size if isinstance(size, int) else None
        self._position = 0
        self._buffer = b""
        self._buffer_start = 0
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
        if whence == io.SEEK_CUR:  # the handle is at another position: it has read ahead
            offset, whence = self._position + offset, io.SEEK_SET
        self._position = int(self._handle.seek(offset, whence))
        return self._position

    def readinto(self, buffer: Any) -> int:
        if not self._buffer_start <= self._position < self._buffer_start + len(self._buffer):
            self._fetch(len(buffer))
        start = self._position - self._buffer_start
        data = self._buffer[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, wanted: int) -> None:
        goes_on = self._buffer and self._position == self._buffer_start + len(self._buffer)
        self._ahead_bytes = min(4 * self._ahead_bytes, _MOST_AHEAD_BYTES) if goes_on else FIRST_BYTES
        size = max(wanted, self._ahead_bytes)
        self._buffer = retried(lambda: self._read(size), self._uri, Stage.READ)
        self._buffer_start = self._position

    def _read(self, size: int) -> bytes:
        # After a failed read the handle may stand anywhere.
        if self._handle.tell() != self._position:
            self._handle.seek(self._position)
        data = bytes(self._handle.read(size))
        # A connection that closes early must not look like the end of the file. A short read is harmless: the rest is
        # requested next.
        if not data and size and self._size is not None and self._position < self._size:
            raise _cut_off(self._position, self._size)
        return data

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()
