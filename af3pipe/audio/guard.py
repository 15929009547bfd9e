"""Decoding where a crash or a hang costs one recording and not the worker: in processes of its own.

Native decoders parse what anybody may have uploaded. A `DecoderPool` runs them in a few processes. Each decodes one
recording at a time, is kept for the next, and is replaced when it dies, hangs or wants too much memory. The parent
reads the file, so that credentials and retries stay here, and gets the samples through shared memory; `guarded` is
the other side. Needs file descriptors that a child inherits: on Windows, `decode.open_decoding` decodes in process.
"""

import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from af3pipe.audio.blocks import Samples
from af3pipe.audio.decode import Asked, Decoding
from af3pipe.audio.guarded import MEMORY_BYTES, DecoderLimits, Link, Memory
from af3pipe.schemas import AudioInfo, Reason, Rejected, Stage

DEFAULT_LIMITS = DecoderLimits()
IS_SUPPORTED = os.name == "posix"

_RECORDINGS_PER_PROCESS = 1000  # then a new one, so that what a decoder leaks does not add up
_START_TIMEOUT_S = 120.0
_STARTS = 3  # where memory is short the system may end a process that has done nothing yet
# A new process's glibc gives freed memory back at once: of a 10 s clip, 8 MB to be mapped and zeroed again each time,
# which takes half as long as decoding it.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_log = logging.getLogger(__name__)


class GuardError(Exception):
    """No decoder process can be started here: the worker is unfit, no recording is to blame."""


class DecoderError(Exception):
    """Something unexpected was raised in a decoder process; the traceback from there is the cause."""


class _Traceback(Exception):
    """The text of a traceback in the decoder process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Died(Exception):
    """The process ended in the middle of a command, or had to be ended; `reason` says of what."""

    def __init__(self, reason: Reason, how: str) -> None:
        super().__init__(how)
        self.reason = reason


class DecoderPool:
    """Opens recordings in decoder processes: as many as are open at once. For all threads of this process.

    Args:
        limits: What each of them may take.
        decoder: `module:function` of the `OpenDecoding` that is called there.
    """

    def __init__(
        self,
        limits: DecoderLimits = DEFAULT_LIMITS,
        *,
        decoder: str = "af3pipe.audio.decode:open_decoding",
    ) -> None:
        self._limits = limits
        self._decoder = decoder
        self._idle: list[_Process] = []
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def open(self, file: BinaryIO, asked: Asked) -> Iterator[Decoding]:
        """Opens a file as `decode.open_decoding` does.

        A process that dies before it gave a sample may have been broken by an earlier recording: unless it was new
        or hangs, this one is tried again in a new one.

        Raises:
            Rejected: As `decode.decode`, and decoder_crashed, decode_timeout and out_of_memory.
            DecoderError: Something unexpected was raised there.
            GuardError: No process can be started.
        """
        session = _Session(self, file, asked)
        try:
            yield _GuardedDecoding(session, asked)
        finally:
            session.close()

    def close(self) -> None:
        """Ends the idle processes, and the others as soon as their recordings are closed."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.kill()

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, *, new: bool) -> "_Process":
        with self._lock:
            if self._idle and not new:
                return self._idle.pop()
        for _ in range(_STARTS - 1):
            with suppress(GuardError):
                return _Process(self._decoder, self._limits)
        return _Process(self._decoder, self._limits)

    def give_back(self, process: "_Process") -> None:
        with self._lock:
            if not self._closed and process.recordings < _RECORDINGS_PER_PROCESS:
                self._idle.append(process)
                return
        process.kill()


class _GuardedDecoding(Decoding):
    """Decodes in another process."""

    def __init__(self, session: "_Session", asked: Asked) -> None:
        opened = session.ask("open")
        super().__init__(AudioInfo(*opened["info"]), opened["stated_frames"], asked)
        self._session = session

    def blocks(self) -> Iterator[Samples]:
        while True:
            told = self._session.ask("next", decoding=self)
            self.frames_read, self.ended = told["frames_read"], told["ended"]
            if told["kind"] == "end":
                self._session.end()
                return
            self.samples += told["count"]
            yield self._session.samples(told["count"])


class _Session:
    """One recording in one process; in a second one, where the first may have been broken before."""

    def __init__(self, pool: DecoderPool, file: BinaryIO, asked: Asked) -> None:
        self._pool = pool
        self._file = file
        self._asked = asked
        self._process: _Process | None = None

    def ask(self, kind: str, decoding: Decoding | None = None) -> dict[str, Any]:
        """The reply to `open` or `next`. Raises as `DecoderPool.open`; then the session is over."""
        process = self._process or self._take()
        try:
            reply = self._ask(process, kind)
        except _Died as died:
            is_its_own = process.recordings == 1 or died.reason is Reason.DECODE_TIMEOUT
            if is_its_own or (decoding is not None and decoding.samples):
                raise self._rejected(died, decoding) from None
            _log.warning("a used decoder process %s; its recording is tried again in a new one", died)
            process = self._take(new=True)
            try:
                reply = self._ask(process, "open")
                reply = self._ask(process, kind) if kind != "open" and reply["kind"] == "opened" else reply
            except _Died as died_again:
                raise self._rejected(died_again, decoding) from None
        if reply["kind"] not in ("opened", "block", "end"):
            self.end()
            _raise(reply)
        return reply

    def samples(self, count: int) -> Samples:
        """The block that the last reply was about, where it lies: until the next command."""
        assert self._process is not None
        block: Samples = self._process.memory.output[:count]
        block.flags.writeable = False
        return block

    def close(self) -> None:
        """Ends the recording, wherever it is."""
        if self._process is not None:
            self._process.send_close()
            self.end()

    def _take(self, *, new: bool = False) -> "_Process":
        self._process = process = self._pool.take(new=new)
        process.recordings += 1
        return process

    def end(self) -> None:
        """Gives the process back, once its recording is over."""
        process, self._process = self._process, None
        if process is not None:
            self._pool.give_back(process)

    def _ask(self, process: "_Process", kind: str) -> dict[str, Any]:
        try:
            fields = self._opening() if kind == "open" else {}
            return process.ask(kind, fields, self._file)
        except BaseException:
            # Of the store, or an interrupt, or the process is dead: it is in the middle of something.
            self._process = None
            process.kill()
            raise

    def _opening(self) -> dict[str, Any]:
        fields = {"asked": self._asked, "size_bytes": self._file.seek(0, os.SEEK_END)}
        with suppress(OSError, AttributeError):  # it is no file on a disk
            state = os.fstat(self._file.fileno())
            # What gzip opens has the descriptor of the file below it, and another size.
            if stat.S_ISREG(state.st_mode) and state.st_size == fields["size_bytes"]:
                fields["descriptor"] = self._file.fileno()
        return fields

    def _rejected(self, died: _Died, decoding: Decoding | None) -> Rejected:
        if decoding is None:
            return Rejected(Stage.PROBE, died.reason, f"The decoder process {died} while it opened the file.")
        return decoding.rejected(died.reason, f"The decoder process {died} after {decoding.position_s:.1f} s.")


def _raise(reply: dict[str, Any]) -> None:
    if reply["kind"] == "rejected":
        del reply["kind"]
        raise Rejected(**{**reply, "stage": Stage(reply["stage"]), "reason": Reason(reply["reason"])})
    raise DecoderError(reply["error"]) from _Traceback(reply["traceback"])


class _Process:
    """A decoder process, its link and memory. Belongs to one recording at a time.

    Attributes:
        recordings: How many were begun in it.
    """

    def __init__(self, decoder: str, limits: DecoderLimits) -> None:
        self.recordings = 0
        self._limits = limits
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (read when the process has died)
        ours, theirs = socket.socketpair()
        self._link = Link(ours)
        with theirs, _shared_file() as shared:
            self.memory = Memory(shared.fileno())
            self._process = self._start((theirs.fileno(), shared.fileno()), decoder)
        try:
            self._link.receive(_START_TIMEOUT_S)
        except (EOFError, OSError) as error:
            self.kill()
            raise GuardError(f"no decoder process can be started: {self._last_words() or error}") from error

    def _start(self, fds: tuple[int, int], decoder: str) -> "subprocess.Popen[bytes]":
        code = f"from af3pipe.audio.guarded import *; serve(*{fds}, {decoder!r}, {self._limits})"
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        try:
            return subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=fds,
                env={**os.environ, **_KEEP_MEMORY, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            )
        except OSError as error:
            raise GuardError(f"no decoder process can be started: {error}") from error

    def ask(self, kind: str, fields: dict[str, Any], file: BinaryIO) -> dict[str, Any]:
        """The process's reply to a command, once it has been given all the bytes it needs for it.

        Raises:
            _Died: It ended, wants more memory, or took too long, not counting the time that `file` took.
        """
        failure: Exception | None = None
        timeout_s = self._limits.timeout_s
        deadline = time.monotonic() + timeout_s
        try:
            self._link.send(kind, **fields)
            while (message := self._link.receive(deadline - time.monotonic()))["kind"] == "read":
                began = time.monotonic()
                try:
                    self._link.send("bytes", count=self._read(file, message["offset"], message["size"]))
                except Exception as error:  # noqa: BLE001  (raised below, once the process has let go of the file)
                    failure = error
                    self._link.send("failed")
                deadline += time.monotonic() - began
        except TimeoutError:
            raise _Died(Reason.DECODE_TIMEOUT, f"was ended because a step took longer than {timeout_s:g} s") from None
        except (EOFError, ConnectionError):
            raise _Died(Reason.DECODER_CRASHED, self._how_it_ended()) from None
        if failure is not None:
            raise failure
        if message["kind"] == "out_of_memory":
            raise _Died(Reason.OUT_OF_MEMORY, f"was ended because it wanted more than {self._limits.memory_mib} MiB")
        return message

    def send_close(self) -> None:
        """Tells it that nobody wants the rest; whether it is alive shows with the next command."""
        with suppress(OSError):
            self._link.send("close")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._link.close()

    def _read(self, file: BinaryIO, offset: int, size: int) -> int:
        file.seek(offset)
        data = file.read(size)
        self.memory.input[: len(data)] = data
        return len(data)

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "hung up"
        if words := self._last_words():
            _log.warning("last words of a decoder process: %s", words)
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def _last_words(self) -> str:
        self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - 4096, 0))
        return self._errors.read().decode(errors="replace").partition("\nExtension modules:")[0].strip()


def _shared_file() -> BinaryIO:
    """Memory with a file descriptor; a file without a name where the system has no such thing."""
    if hasattr(os, "memfd_create"):
        file: BinaryIO = os.fdopen(os.memfd_create("af3pipe-decoder"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (the caller closes it)
    file.truncate(MEMORY_BYTES)
    return file
