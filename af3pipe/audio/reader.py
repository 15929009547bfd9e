"""Reads a file for the decoders, and stores its first error, which decoders would hide."""

import io
from typing import Any, BinaryIO


class Reader:
    """A file for the decoders that stores the first exception instead of raising it.

    libsndfile calls `read` through cffi, which prints an exception and treats it as the end of the file: a failing
    store would look like a short recording. So the error is stored, and `raise_error` raises it.

    Attributes:
        size_bytes: Size that the decoders see: of the whole file, until `begin_at`.
        at_end: Whether a decoder has requested bytes beyond the end.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self._error: BaseException | None = None
        self._file_bytes = file.seek(0, io.SEEK_END)
        self.at_end = False
        self.begin_at(b"", 0)

    def begin_at(self, head: bytes, start: int) -> None:
        """Replaces the file's content by `head` and the content from `start` on."""
        self._head = head
        self._shift = start - len(head)
        self.size_bytes = max(self._file_bytes - self._shift, len(head))

    def read(self, size: int = -1) -> bytes:
        """Returns `size` bytes; fewer only at the end of the file or after an error."""
        if self._error is not None:
            return b""
        if self._position >= self.size_bytes:  # maybe far beyond: broken headers point to where no file can seek
            self.at_end = self.at_end or size != 0
            return b""
        missing = size if size >= 0 else self.size_bytes - self._position
        parts = [self._head[self._position : self._position + missing]]
        missing -= len(parts[0])
        try:
            position = max(self._position, len(self._head)) + self._shift
            if missing and self._file.tell() != position:
                self._file.seek(position)
            while missing and (part := self._file.read(missing)):
                parts.append(part)
                missing -= len(part)
        except BaseException as error:  # noqa: BLE001  (raised again by raise_error, on this side of the decoder)
            self._error = error
            return b""
        self.at_end = self.at_end or missing > 0
        data = b"".join(parts)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Reads into a buffer, as `read`; libsndfile calls it with 8 KiB at a time."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position in bytes, as `io.IOBase.seek` does; the file itself moves with the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        """Returns the position in bytes."""
        return self._position

    def raise_error(self) -> None:
        """Raises the stored error of the file, if there is one."""
        if self._error is not None:
            raise self._error
