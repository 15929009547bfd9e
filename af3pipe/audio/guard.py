"""Decodes in separate processes, so that a crash or hang of a decoder affects one file and not the worker.

Native decoders parse untrusted files. A `DecoderPool` runs them in a few processes. Each decodes one recording at a
time, is reused for the next, and is replaced when it dies, hangs or needs too much memory. The parent reads the file,
so that the store, its retries and its errors stay here, and gets the samples through shared memory; `guarded` is the
other side. It needs file descriptors that a child inherits: on Windows, `decoding.open_in_process` decodes in the
worker's process.
"""

import logging
import os
import stat
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from af3pipe.audio.decoder_process import DecoderProcess, Died, GuardError
from af3pipe.audio.decoding import Asked, Decoding, Part, Piece, Samples
from af3pipe.audio.guarded import DecoderLimits
from af3pipe.schemas import AudioInfo, Reason, Rejected, Stage

DEFAULT_LIMITS = DecoderLimits()
MOST_TIMEOUT_S = 86_400.0
LEAST_MEMORY_MIB, MOST_MEMORY_MIB = 64, 1 << 20
IS_SUPPORTED = os.name == "posix"

_RECORDINGS_PER_PROCESS = 1000  # then a new one, so that what a decoder leaks does not add up
_MOST_IDLE = 8  # as many as a step decodes at once; those of a moment when several steps did end
_STARTS = 3  # where memory is short the system may end a process that has done nothing yet
_log = logging.getLogger(__name__)


class DecoderError(Exception):
    """An unexpected exception of a decoder process; its traceback is the cause."""


class _Traceback(Exception):
    """Carries the text of a traceback from the decoder process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def check_limits(limits: DecoderLimits) -> None:
    """Raises ValueError for limits that cannot be applied to a process."""
    if not 0 < limits.timeout_s <= MOST_TIMEOUT_S:
        raise ValueError(f"timeout_s is {limits.timeout_s:g}; it must be more than 0 and at most {MOST_TIMEOUT_S:g}")
    if not LEAST_MEMORY_MIB <= limits.memory_mib <= MOST_MEMORY_MIB:
        raise ValueError(f"memory_mib is {limits.memory_mib}; it must be {LEAST_MEMORY_MIB} to {MOST_MEMORY_MIB}")


class DecoderPool:
    """Opens recordings in decoder processes, as many as are open at once; shared by all threads of this process.

    Args:
        limits: Limits of each decoder process.
        decoder: `module:function` of the `OpenDecoding` to call there.

    Raises:
        ValueError: The limits cannot be applied to a process.
    """

    def __init__(
        self,
        limits: DecoderLimits = DEFAULT_LIMITS,
        *,
        decoder: str = "af3pipe.audio.decode:open_decoding",
    ) -> None:
        check_limits(limits)
        self._limits = limits
        self._decoder = decoder
        self._idle: list[DecoderProcess] = []
        self._processes: weakref.WeakSet[DecoderProcess] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        _pools.add(self)

    @contextmanager
    def open(self, file: BinaryIO, asked: Asked) -> Iterator[Decoding]:
        """Opens a file as `decode.open_decoding` does.

        If the process dies, the file is decoded again in a new one, without repeating what was yielded before, if the
        process had decoded other files, one of which may have broken it, or was killed from outside, maybe because
        others used too much memory.

        Raises:
            Rejected: As `decode.open_decoding`, and decoder_crashed, decode_timeout and out_of_memory; from `pieces`
                as well.
            DecoderError: The process raised an unexpected exception.
            GuardError: No process can be started.
        """
        session = _Session(self, file, asked)
        try:
            yield _GuardedDecoding(session, asked)
        finally:
            session.close()

    def close(self) -> None:
        """Ends the idle processes, and the others when their recordings are closed."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.kill()

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forget(self) -> None:
        """Forgets all processes in a forked child: they are the parent's."""
        self._lock = threading.Lock()
        self._idle.clear()
        for process in self._processes:
            process.forget()

    def take(self, *, new: bool) -> DecoderProcess:
        with self._lock:
            if self._idle and not new:
                return self._idle.pop()
        for _ in range(_STARTS - 1):
            with suppress(GuardError):
                return self._new()
        return self._new()

    def _new(self) -> DecoderProcess:
        process = DecoderProcess(self._decoder, self._limits)
        self._processes.add(process)
        return process

    def give_back(self, process: DecoderProcess) -> None:
        with self._lock:
            is_wanted = not self._closed and len(self._idle) < _MOST_IDLE
            if is_wanted and process.recordings < _RECORDINGS_PER_PROCESS:
                self._idle.append(process)
                return
        process.kill()


class _GuardedDecoding(Decoding):
    """Decodes in another process."""

    def __init__(self, session: "_Session", asked: Asked) -> None:
        opened = session.ask("open")
        super().__init__(AudioInfo(*opened["info"]), opened["stated_frames"], asked.sample_rate)
        self._session = session

    def pieces(self, parts: Sequence[Part]) -> Iterator[Piece | None]:
        self._session.parts = parts
        kind = "decode"
        while True:
            reply = self._session.ask(kind, decoding=self)
            self.frames_read, self.ended = reply["frames_read"], reply["ended"]
            if reply["kind"] == "end":
                self._session.end()
                return
            samples, start = self._session.samples(), 0
            for part, count, is_end, rejected in reply["pieces"]:
                yield Piece(part, samples[start : start + count], is_end, rejected and _rejected(rejected))
                start += count
            yield None
            kind = "next"


class _Session:
    """Decodes one file in one process; in a second one, if the first may have been broken before."""

    def __init__(self, pool: DecoderPool, file: BinaryIO, asked: Asked) -> None:
        self.parts: Sequence[Part] = ()
        self._pool = pool
        self._file = file
        self._asked = asked
        self._process: DecoderProcess | None = None
        self._messages = 0

    def ask(self, kind: str, decoding: Decoding | None = None) -> dict[str, Any]:
        """Returns the reply to `open`, `decode` or `next`. Raises as `DecoderPool.open`; then the session is over."""
        if self._process is None and kind != "open":
            raise RuntimeError("the recording is closed, or was decoded already; open it again")
        process = self._process or self._take()
        try:
            reply = self._ask(process, kind)
        except Died as died:
            if process.recordings == 1 and not died.from_outside:
                raise self._rejected(died, decoding) from None
            _log.warning("a decoder process %s; its recording is decoded again in a new one", died)
            try:
                reply = self._again(kind)
            except Died as died_again:
                raise self._rejected(died_again, decoding) from None
        if reply["kind"] not in ("opened", "pieces", "end"):
            self.end()
            _raise(reply)
        self._messages += reply["kind"] == "pieces"
        return reply

    def _again(self, kind: str) -> dict[str, Any]:
        process = self._take(new=True)
        reply = self._ask(process, "open")
        if kind == "open" or reply["kind"] != "opened":
            return reply
        # Decoding gives the same messages every time; those that were yielded already are skipped.
        reply = self._ask(process, "decode")
        for _ in range(self._messages):
            if reply["kind"] != "pieces":
                break
            reply = self._ask(process, "next")
        return reply

    def samples(self) -> Samples:
        """Returns the memory of the last reply's samples, valid until the next command; shape (at least n,)."""
        assert self._process is not None
        samples: Samples = self._process.memory.output[:]
        samples.flags.writeable = False
        return samples

    def close(self) -> None:
        """Ends the recording, at any point."""
        if self._process is None:
            return
        try:
            self._ask(self._process, "close")
        except Exception as error:  # noqa: BLE001  (all of the recording that was wanted is there already)
            _log.warning("a decoder process %s while it closed a recording", error)
        self.end()

    def _take(self, *, new: bool = False) -> DecoderProcess:
        self._process = process = self._pool.take(new=new)
        process.recordings += 1
        return process

    def end(self) -> None:
        """Returns the process to the pool, once its recording is over."""
        process, self._process = self._process, None
        if process is not None:
            self._pool.give_back(process)

    def _ask(self, process: DecoderProcess, kind: str) -> dict[str, Any]:
        try:
            fields = self._opening() if kind == "open" else {"parts": self.parts} if kind == "decode" else {}
            return process.ask(kind, fields, self._file)
        except BaseException:
            # An error of the store, an interrupt or a dead process: it is in the middle of a command.
            self._process = None
            process.kill()
            raise

    def _opening(self) -> dict[str, Any]:
        fields = {"asked": self._asked, "size_bytes": self._file.seek(0, os.SEEK_END)}
        with suppress(Exception):  # any error means that it is not a file on a disk
            state = os.fstat(self._file.fileno())
            # What gzip opens has the descriptor of the file below it, and another size.
            if stat.S_ISREG(state.st_mode) and state.st_size == fields["size_bytes"]:
                fields["descriptor"] = self._file.fileno()
        return fields

    def _rejected(self, died: Died, decoding: Decoding | None) -> Rejected:
        if decoding is None:
            return Rejected(Stage.PROBE, died.reason, f"The decoder process {died} while it opened the file.")
        return decoding.rejected(died.reason, f"The decoder process {died} after {decoding.position_s:.1f} s.")


def _raise(reply: dict[str, Any]) -> None:
    if reply["kind"] == "rejected":
        raise _rejected({name: value for name, value in reply.items() if name != "kind"})
    raise DecoderError(reply["error"]) from _Traceback(reply["traceback"])


def _rejected(fields: dict[str, Any]) -> Rejected:
    return Rejected(**{**fields, "stage": Stage(fields["stage"]), "reason": Reason(fields["reason"])})


_shared: dict[DecoderLimits, tuple[DecoderPool, int]] = {}
_shared_lock = threading.Lock()


def acquire_decoders(limits: DecoderLimits) -> DecoderPool:
    """Returns the process's one pool with these limits. Pair each call with one `release_decoders`."""
    with _shared_lock:
        pool, users = _shared.get(limits) or (DecoderPool(limits), 0)
        _shared[limits] = pool, users + 1
        return pool


def release_decoders(limits: DecoderLimits) -> None:
    """Ends one use from `acquire_decoders`; the last one ends the pool's processes."""
    with _shared_lock:
        pool, users = _shared.pop(limits)
        if users > 1:
            _shared[limits] = pool, users - 1
            return
    pool.close()


_pools: "weakref.WeakSet[DecoderPool]" = weakref.WeakSet()


def _forget_pools() -> None:
    for pool in _pools:
        pool.forget()


# A process forked off this one must neither talk to its decoders nor keep them alive.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
