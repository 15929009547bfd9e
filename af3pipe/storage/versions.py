"""Opens the listed version of an object, and detects changes while it is read."""

import io
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

from fsspec.asyn import sync

from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.objects import ObjectInfo, object_info
from af3pipe.storage.reading import changed, is_bucket, is_generation, is_s3
from af3pipe.storage.retry import StorageError
from af3pipe.storage.stores import info, is_local


class VersionedFile(io.BufferedReader):
    """A binary file, open for reading, of one version of an object. Leaving its `with` block checks the version.

    If the block raised and the object has changed, `changed` replaces that error: it was caused by mixed content.
    """

    def __init__(self, raw: io.RawIOBase, buffer_size: int, check: Callable[[], None]) -> None:
        super().__init__(raw, buffer_size)
        self._check = check

    def check_unchanged(self) -> None:
        """Checks that everything read so far is of the requested version.

        Call it when all is read, before using the data. Reads by another process through this file's descriptor are
        covered. It costs nothing in S3 and Google Cloud Storage, where each read is checked, an `fstat` on a disk,
        and a request on other stores.

        Raises:
            Rejected: changed; and as `storage.stat`, where it costs a request.
        """
        self._check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._check()
            elif isinstance(error, Exception) and not _is_stores_own(error):
                self._check_after(error)
        finally:
            self.close()

    def _check_after(self, error: Exception) -> None:
        try:
            self._check()
        except (Rejected, StorageError) as found:
            if isinstance(found, Rejected) and found.reason is Reason.CHANGED:
                raise found from error


def _is_stores_own(error: Exception) -> bool:
    return isinstance(error, StorageError) or (isinstance(error, Rejected) and error.stage is Stage.READ)


def version_check(fs: Any, path: str, expected: ObjectInfo, handle: Any) -> Callable[[], None]:
    """Returns a function that raises if an object is not, or no longer, the listed version.

    Args:
        fs: The file system.
        path: Path of the object, as the file system spells it.
        expected: The object as listed; fields that are None are not compared.
        handle: The object's file, just opened.

    Raises:
        Rejected: changed, if a local file has already been replaced.
    """
    if is_local(fs):
        return _local_check(fs, path, expected, handle.fileno())
    is_checked_when_read = (is_s3(fs) and expected.etag) or _reads_generations(fs, path, expected.etag)
    if is_checked_when_read or (expected.etag, expected.size_bytes, expected.mtime) == (None, None, None):
        return lambda: None

    def ask_again() -> None:
        getattr(fs, "dircache", {}).pop(fs._parent(path), None)
        _compare(object_info(fs, info(fs, path, expected.uri, Stage.READ), ""), expected)

    return ask_again


def _local_check(fs: Any, path: str, expected: ObjectInfo, descriptor: int) -> Callable[[], None]:
    opened = os.fstat(descriptor)
    _compare(object_info(fs, {"name": path, "size": opened.st_size, "mtime": opened.st_mtime}, ""), expected)

    def compare() -> None:
        # Of the file that is open: whatever has taken its name meanwhile is of no concern.
        found = os.fstat(descriptor)
        if (found.st_size, found.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns):
            raise changed(
                expected.uri, f"it had {opened.st_size} bytes and has {found.st_size}, or was written again"
            )

    return compare


def _reads_generations(fs: Any, path: str, version: str | None) -> bool:
    if not is_bucket(fs) or is_s3(fs) or not is_generation(version):
        return False
    # Of Rapid buckets, which it reads by another protocol, gcsfs takes the newest version, whichever is requested.
    is_zonal = getattr(fs, "_is_zonal_bucket", None)
    return is_zonal is None or not sync(fs.loop, is_zonal, path.partition("/")[0])


def _compare(found: ObjectInfo, expected: ObjectInfo) -> None:
    if found.etag and expected.etag:
        if found.etag != expected.etag:
            raise changed(expected.uri, f"its etag was {expected.etag} and is {found.etag}")
        return
    for what in ("size_bytes", "mtime"):
        was, is_now = getattr(expected, what), getattr(found, what)
        if None not in (was, is_now) and was != is_now:
            raise changed(expected.uri, f"its {what} was {was} and is {is_now}")
