"""Runs inside a decoder process: serves one parent and decodes one file at a time. See `guard`.

The parent leads; every command has one reply, and before it the process may request bytes of the file:

    parent                          process
    open {size_bytes, asked}  ->                              with a descriptor, for a file on a disk
                              <-    read {offset, size}       any number of times, for any command
    bytes {count} or failed   ->
                              <-    opened {info, stated_frames}
    decode {parts}            ->
                              <-    pieces {pieces, frames_read, ended}
    next                      ->                              as often as there are more
                              <-    pieces {...}              or end {...}, once the file is closed
    close                     ->                              where it is not yet
                              <-    closed

A `pieces` message has the pieces of all parts from about 10 s of the file, maybe none, so that each step is short;
pieces that do not fit into the shared memory come with the next message. A piece is [part, count of samples, whether
the part ends, null or why it was rejected], and the samples of all pieces are consecutive in the shared memory.

Instead of a reply there may be `rejected`, `store_failed`, `out_of_memory` or `error`, which end the file. Messages
are JSON, so that the parent never unpickles data from a corrupted process; bytes and samples are in shared memory.
"""

import importlib
import io
import json
import mmap
import os
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from af3pipe.audio.decoding import Asked, Decoding, OpenDecoding, Part, Piece, Samples
from af3pipe.schemas import Rejected

INPUT_BYTES = 1 << 20
"""Size of the first area of the shared memory: bytes of the file."""
OUTPUT_FRAMES = 1 << 18
"""Size of the second area: decoded samples, float32. A block of 10 s at 16 kHz takes 0.6 of it."""
MEMORY_BYTES = INPUT_BYTES + 4 * OUTPUT_FRAMES

# Read ahead from where a decoder seeks to, doubled while it reads on: headers cost little, bodies few messages.
_FIRST_READ_BYTES = 1 << 16
# A read from a disk that took longer is reported, so that it does not count as decoding.
_SLOW_READ_S = 0.05
# What the parent takes to notice that the time is over; the alarm is for a process whose parent is dead.
_GRACE_S = 5


class Link:
    """Sends and receives messages on a socket pair: one line of JSON each, and descriptors of open files."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lines = bytearray()
        self._descriptors: list[int] = []

    def send(self, kind: str, *, descriptor: int | None = None, **fields: Any) -> None:
        """Sends one message; the other side gets a copy of `descriptor` with it."""
        message = {"kind": kind, **fields}
        if descriptor is None:
            self._end.sendall(json.dumps(message).encode() + b"\n")
        else:
            message["descriptor"] = True
            socket.send_fds(self._end, [json.dumps(message).encode() + b"\n"], [descriptor])

    def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Receives the next message; a descriptor that came with it is its field `descriptor`.

        Raises:
            EOFError: The other side has closed the link.
            TimeoutError: No message came in that time.
        """
        if timeout_s != self._end.gettimeout():
            self._end.settimeout(None if timeout_s is None else max(timeout_s, 0.001))
        searched = 0
        while (end := self._lines.find(b"\n", searched)) < 0:
            searched = len(self._lines)
            part, descriptors, _, _ = socket.recv_fds(self._end, 1 << 16, 1)
            if not part:
                raise EOFError("the other side has closed the link")
            self._lines += part
            self._descriptors += descriptors
        message: dict[str, Any] = json.loads(self._lines[:end])
        del self._lines[: end + 1]
        if "descriptor" in message:
            message["descriptor"] = self._descriptors.pop(0)
        return message

    def close(self) -> None:
        """Closes this end; the other side then receives an end of file."""
        self._end.close()


class Memory:
    """The shared memory: one area for bytes of the file, and one for samples."""

    def __init__(self, fd: int) -> None:
        memory = mmap.mmap(fd, MEMORY_BYTES)
        self.input = memoryview(memory)[:INPUT_BYTES]
        self.output = np.frombuffer(memory, np.float32, OUTPUT_FRAMES, INPUT_BYTES)


class DecoderLimits(NamedTuple):
    """Limits of a decoder; if it exceeds one, it is killed and its recording rejected.

    Attributes:
        timeout_s: Longest time for one step, opening or a block of 10 s (typically 20 ms). Reads do not count, except
            a single read from a disk that takes longer than this.
        memory_mib: Most memory beyond that of the idle process; enforced on Linux only. 10 s of 8 channels at 192 kHz
            need about 200.
    """

    timeout_s: float = 60.0
    memory_mib: int = 1024


class _StoreFailed(Exception):
    """The parent could not read the file, and has the error."""


class _ParentsFile(io.RawIOBase):
    """The file as the decoder process sees it: the parent reads it, one chunk at a time.

    A file on a disk is read here, for speed; if that fails, the parent retries and explains the error.
    """

    def __init__(
        self, link: Link, memory: Memory, limits: DecoderLimits, size_bytes: int, descriptor: int | None
    ) -> None:
        self._link = link
        self._memory = memory
        self._limits = limits
        self._size = size_bytes
        self._descriptor = descriptor
        self._position = 0
        self._chunk = memoryview(b"")
        self._chunk_start = 0
        self._read_bytes = _FIRST_READ_BYTES

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Returns fewer bytes than requested at the end of a chunk; none at the end of the file."""
        if self._position >= self._size:
            return b""
        start = self._position - self._chunk_start
        if not 0 <= start < len(self._chunk):
            self._fetch()
            start = 0
        data = bytes(self._chunk[start : None if size < 0 else start + size])
        self._position += len(data)
        return data

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()

    def _fetch(self) -> None:
        goes_on = len(self._chunk) > 0 and self._position == self._chunk_start + len(self._chunk)
        self._read_bytes = min(2 * self._read_bytes, INPUT_BYTES) if goes_on else _FIRST_READ_BYTES
        size = min(self._read_bytes, self._size - self._position)
        self._chunk = self._read_here(size) or self._read_there(size)
        self._chunk_start = self._position

    def _read_here(self, size: int) -> memoryview:
        if self._descriptor is None:
            return memoryview(b"")
        began = time.monotonic()
        try:
            return memoryview(os.pread(self._descriptor, size, self._position))
        except OSError:
            return memoryview(b"")
        finally:
            took_s = time.monotonic() - began
            if took_s > _SLOW_READ_S:
                _set_alarm(self._limits.timeout_s)
                self._link.send("waited", seconds=took_s)

    def _read_there(self, size: int) -> memoryview:
        _set_alarm(0)  # a store may take its time
        self._link.send("read", offset=self._position, size=size)
        reply = self._link.receive()
        _set_alarm(self._limits.timeout_s)
        if reply["kind"] == "failed":
            raise _StoreFailed
        return self._memory.input[: reply["count"]]


def _set_alarm(timeout_s: float) -> None:
    """Has the system kill this process some time after `timeout_s`; 0 cancels it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, timeout_s and timeout_s + _GRACE_S)


def _limit_memory(memory_bytes: int) -> None:
    """Limits this process to this much memory beyond what it has; further allocations fail."""
    import resource

    try:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    except OSError:
        return  # not Linux: elsewhere the limit is not kept, or counts what is only reserved
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def serve(link_fd: int, memory_fd: int, decoder: str, limits: DecoderLimits) -> None:
    """Decodes the files that the parent sends, until the parent closes its end.

    Args:
        link_fd: This process's end of the socket pair.
        memory_fd: Descriptor of the shared memory.
        decoder: `module:function` of an `OpenDecoding`.
        limits: Limits of each step.
    """
    import resource  # not on Windows, where this module is imported but nothing of it is used

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a group: the parent decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    link, memory = Link(socket.socket(fileno=link_fd)), Memory(memory_fd)
    module, _, function = decoder.partition(":")
    open_decoding: OpenDecoding = getattr(importlib.import_module(module), function)
    _limit_memory(limits.memory_mib << 20)
    link.send("ready")
    while True:
        try:
            command = link.receive()
        except (EOFError, OSError):
            return
        if command["kind"] != "open":
            link.send("error", error=f"{command['kind']} before open", traceback="")
            continue
        _set_alarm(limits.timeout_s)
        file = _ParentsFile(link, memory, limits, command["size_bytes"], command.get("descriptor"))
        with closing(file):
            opening = open_decoding(cast(BinaryIO, file), Asked(*command["asked"]))
            reply = _serve_recording(link, memory, limits, opening)
        _set_alarm(0)
        link.send(**reply)


def _serve_recording(
    link: Link, memory: Memory, limits: DecoderLimits, opening: AbstractContextManager[Decoding]
) -> dict[str, Any]:
    """Decodes one recording and closes it; returns its last reply, to be sent only then."""
    try:
        with opening as decoding:
            link.send("opened", info=decoding.info, stated_frames=decoding.stated_frames)
            return _serve_pieces(link, memory, limits, decoding)
    except Rejected as rejected:
        return {"kind": "rejected", **_fields(rejected)}
    except _StoreFailed:
        return {"kind": "store_failed"}
    except MemoryError:
        return {"kind": "out_of_memory"}
    except Exception as error:  # noqa: BLE001  (raised again in the parent)
        return {"kind": "error", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _serve_pieces(link: Link, memory: Memory, limits: DecoderLimits, decoding: Decoding) -> dict[str, Any]:
    messages: Iterator[list[Any]] = iter(())
    while True:
        _set_alarm(0)
        command = link.receive()
        _set_alarm(limits.timeout_s)
        if command["kind"] == "close":
            return {"kind": "closed"}
        if command["kind"] == "decode":
            messages = _in_messages(decoding.pieces([Part(*part) for part in command["parts"]]), memory.output)
        pieces = next(messages, None)
        state = {"frames_read": decoding.frames_read, "ended": decoding.ended}
        if pieces is None:
            return {"kind": "end", **state}
        link.send("pieces", pieces=pieces, **state)


def _in_messages(pieces: Iterator[Piece | None], output: Samples) -> Iterator[list[Any]]:
    """Yields the pieces for one message after the other; their samples are in `output` until the next is taken."""
    message: list[Any] = []
    count = 0
    for piece in pieces:
        if piece is None:
            yield message
            message, count = [], 0
            continue
        samples = piece.samples
        while len(samples) > len(output) - count:
            fits = len(output) - count
            output[count:] = samples[:fits]
            yield [*message, (piece.part, fits, False, None)]
            samples, message, count = samples[fits:], [], 0
        output[count : count + len(samples)] = samples
        count += len(samples)
        rejected = None if piece.rejected is None else _fields(piece.rejected)
        message.append((piece.part, len(samples), piece.is_end, rejected))
    if message:
        yield message


def _fields(rejected: Rejected) -> dict[str, Any]:
    return {
        "stage": rejected.stage.value,
        "reason": rejected.reason.value,
        "detail": rejected.detail,
        "decoder": rejected.decoder,
        "position_s": rejected.position_s,
    }
