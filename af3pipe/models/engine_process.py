"""Runs one engine in its own process for a parent, which sends requests over a socket. See `engine_group`.

    parent                          process
    (options, log levels)     ->
                              <-    Opened, or Failed and the end
    Ask(id, kind, request)    ->    any number of times
                              <-    Accepted(id)              once the engine's queue had room for it
    Cancel(id)                ->                              at any time
                              <-    Done(id, stats, result)   in the order of completion

Log records come in between. Both sides are this package and trust each other, so messages are pickled. The process
ends when its parent closes the socket or ends.
"""

import logging
import logging.handlers
import os
import pickle
import signal
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

from af3pipe.models.engine import Engine, EngineFailed, EngineInfo, EngineStats, ModelError, open_engine
from af3pipe.schemas import Rejected, Reply, Request


class Ask(NamedTuple):
    """A request, and the method that processes it."""

    id: int
    kind: Literal["submit", "ask_alone"]
    request: Request


class Cancel(NamedTuple):
    """Cancels a request that nobody waits for any more."""

    id: int


class Failed(NamedTuple):
    """An error, with its traceback as text if it was unexpected."""

    error: BaseException
    trace: str | None


class Opened(NamedTuple):
    """Says that the engine is ready."""

    info: EngineInfo


class Accepted(NamedTuple):
    """Says that the engine's queue has this request, and may have room for the next."""

    id: int


class Done(NamedTuple):
    """The result of a request, None if it was cancelled, and the statistics since the last one."""

    id: int
    stats: EngineStats
    result: list[Reply] | Failed | None


def serve(link_fd: int) -> None:
    """Opens an engine and processes the parent's requests until the parent closes its end. Does not return.

    Args:
        link_fd: This process's end of the socket pair.
    """
    if sys.platform == "linux":
        _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a group: the parent decides
    link = Connection(link_fd)
    with suppress(EOFError, OSError):
        options, levels = link.recv()
        _Server(link).run(options, levels)
    sys.stderr.flush()
    os._exit(0)  # no thread of a library, and no feeder that waits for room, is waited for


class _Server:
    """Receives on the main thread, so that it notices at once when the parent closes; other threads do the rest."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._futures: dict[int, Future[list[Reply]]] = {}
        self._cancelled: set[int] = set()

    def run(self, options: Any, levels: dict[str, int]) -> None:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger().addHandler(logging.handlers.QueueHandler(self._outbox))
        sender = threading.Thread(target=self._send, name="af3pipe-sender", daemon=True)
        sender.start()
        try:
            self._engine: Engine = open_engine(options)
        except Exception as error:  # noqa: BLE001  (raised again in the parent)
            self._outbox.put(_failed(error))
            self._outbox.put(None)
            sender.join()
            return
        self._outbox.put(Opened(self._engine.info))
        try:
            self._receive()
        finally:
            self._engine.close()

    def _receive(self) -> None:
        feeder = ThreadPoolExecutor(1, "af3pipe-feeder")
        while True:
            message = self._link.recv()
            if isinstance(message, Ask):
                feeder.submit(self._ask, message)
                continue
            self._cancelled.add(message.id)  # before the look at _futures: the feeder looks in the other order
            if future := self._futures.get(message.id):
                future.cancel()

    def _ask(self, ask: Ask) -> None:
        try:
            future = getattr(self._engine, ask.kind)(ask.request)
        except Exception as error:  # noqa: BLE001  (raised again in the parent)
            future = Future()
            future.set_exception(error)
        self._futures[ask.id] = future
        self._outbox.put(Accepted(ask.id))
        # Not on the engine's thread, which has better things to do.
        future.add_done_callback(lambda done: self._outbox.put((ask.id, done)))
        if ask.id in self._cancelled:
            future.cancel()

    def _send(self) -> None:
        with suppress(OSError):  # the parent has ended: the main thread notices it, too
            while (message := self._outbox.get()) is not None:
                message = self._done(*message) if type(message) is tuple else message
                self._link.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def _done(self, ask_id: int, future: "Future[list[Reply]]") -> Done:
        del self._futures[ask_id]
        self._cancelled.discard(ask_id)
        stats = self._engine.take_stats()
        if future.cancelled():
            return Done(ask_id, stats, None)
        error = future.exception()
        return Done(ask_id, stats, _failed(error) if error else future.result())


def _failed(error: BaseException) -> Failed:
    knowingly = isinstance(error, Rejected | EngineFailed | ModelError)
    trace = None if knowingly else "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
        return Failed(error, trace)
    except Exception:  # noqa: BLE001  (a class of a library that cannot be pickled, in any way)
        return Failed(RuntimeError(f"{type(error).__name__}: {error}"), trace)


def _die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends, which lives only for that."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
