"""Controls a decoder process from its parent: starts it, sends commands, enforces limits, ends it. See `guarded`."""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any, BinaryIO

from af3pipe.audio.guarded import MEMORY_BYTES, DecoderLimits, Link, Memory
from af3pipe.schemas import Reason

_START_TIMEOUT_S = 120.0
# A new process's glibc gives freed memory back at once: of a 10 s clip, 8 MB to be mapped and zeroed again each time,
# which takes half as long as decoding it.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # no matrices there
_log = logging.getLogger(__name__)


class GuardError(Exception):
    """No decoder process can be started here: the fault is the worker's, not a recording's."""


class Died(Exception):
    """The process ended in the middle of a command, or had to be killed.

    Attributes:
        reason: Reason for the dead letter.
        from_outside: Whether it was killed from outside, as the system does when memory is short.
    """

    def __init__(self, reason: Reason, how: str, *, from_outside: bool = False) -> None:
        super().__init__(how)
        self.reason = reason
        self.from_outside = from_outside


class DecoderProcess:
    """A decoder process with its link and shared memory. Processes one recording at a time.

    Attributes:
        recordings: Number of recordings it was given.
    """

    def __init__(self, decoder: str, limits: DecoderLimits) -> None:
        self.recordings = 0
        self._limits = limits
        try:
            self._errors = _shared_file(0)
            ours, theirs = socket.socketpair()
            self._link = Link(ours)
            with theirs, _shared_file(MEMORY_BYTES) as shared:
                self.memory = Memory(shared.fileno())
                self._process = self._start((theirs.fileno(), shared.fileno()), decoder)
        except (OSError, ValueError) as error:
            raise GuardError(f"no decoder process can be started: {error}") from error
        try:
            self._link.receive(_START_TIMEOUT_S)
        except (EOFError, OSError, ValueError) as error:
            words = self._last_words()
            self.kill()
            raise GuardError(f"no decoder process can be started: {words or error}") from error

    def _start(self, fds: tuple[int, int], decoder: str) -> "subprocess.Popen[bytes]":
        # What can be imported here can be there, and nothing else: no variable for it holds every path, and Python
        # 3.10 would put the current folder first.
        path = [os.fspath(entry) for entry in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from af3pipe.audio.guarded import *; "
        code += f"serve(*{fds}, {decoder!r}, {self._limits})"
        return subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=fds,
            env={**os.environ, **_KEEP_MEMORY, **_ONE_THREAD},
        )

    def ask(self, kind: str, fields: dict[str, Any], file: BinaryIO) -> dict[str, Any]:
        """Sends a command, serves the process's reads of the file, and returns its reply.

        Raises:
            Died: The process ended, needs more memory than allowed, or took too long, not counting the time of reads
                of `file`.
        """
        failure: Exception | None = None
        timeout_s = self._limits.timeout_s
        deadline = time.monotonic() + timeout_s
        try:
            self._link.send(kind, **fields)
            while (message := self._link.receive(deadline - time.monotonic()))["kind"] in ("read", "waited"):
                if message["kind"] == "waited":
                    deadline += float(message["seconds"])
                    continue
                began, (offset, size) = time.monotonic(), (int(message["offset"]), int(message["size"]))
                try:
                    self._link.send("bytes", count=self._read(file, offset, size))
                except Exception as error:  # noqa: BLE001  (raised below, once the process has let go of the file)
                    failure = error
                    self._link.send("failed")
                deadline += time.monotonic() - began
        except TimeoutError:
            raise Died(Reason.DECODE_TIMEOUT, f"was ended because a step took longer than {timeout_s:g} s") from None
        except (EOFError, ConnectionError):
            how, from_outside = self._how_it_ended()
            raise Died(Reason.DECODER_CRASHED, how, from_outside=from_outside) from None
        except (ValueError, KeyError, TypeError) as error:
            raise Died(Reason.DECODER_CRASHED, f"sent an invalid message ({error!r}), and was ended") from None
        if failure is not None:
            raise failure
        if message["kind"] == "out_of_memory":
            raise Died(Reason.OUT_OF_MEMORY, f"was ended because it needed more than {self._limits.memory_mib} MiB")
        return message

    def kill(self) -> None:
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a disk ends when the disk answers
            self._process.wait(timeout=5)
        self.forget()

    def forget(self) -> None:
        """Closes this end without a message."""
        self._link.close()
        self._errors.close()

    def _read(self, file: BinaryIO, offset: int, size: int) -> int:
        file.seek(offset)
        data = file.read(size)
        self.memory.input[: len(data)] = data
        return len(data)

    def _how_it_ended(self) -> tuple[str, bool]:
        """Describes how it ended in words, and whether it was killed from outside."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "hung up", False
        if words := self._last_words():
            _log.warning("last words of a decoder process: %s", words)
        if code >= 0:
            return f"ended with exit status {code}", False
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"died of {name}", -code in (signal.SIGKILL, signal.SIGTERM)

    def _last_words(self) -> str:
        self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - 4096, 0))
        return self._errors.read().decode(errors="replace").partition("\nExtension modules:")[0].strip()


def _shared_file(size_bytes: int) -> BinaryIO:
    """Creates shared memory with a file descriptor; an unnamed temporary file where the system has no memfd."""
    try:
        file: BinaryIO = os.fdopen(os.memfd_create("af3pipe-decoder"), "r+b", buffering=0)
    except (AttributeError, OSError):
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (the caller closes it)
    file.truncate(size_bytes)
    return file
