"""Runs several engines as one, each in its own process, one per GPU. `engine_process` is the process's side.

The processes are started by this package and not by `multiprocessing`, which would import the user's script again in
each of them, and run its pipeline again if the script has no `__main__` guard.
"""

import itertools
import logging
import operator
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import torch

from af3pipe.models.devices import Device, open_devices
from af3pipe.models.engine import (
    Engine,
    EngineFailed,
    EngineInfo,
    EngineOptions,
    EngineStats,
    ModelError,
    open_engine,
)
from af3pipe.models.engine_process import Accepted, Ask, Cancel, Done, Failed, Opened
from af3pipe.schemas import Reply, Request

_CLOSE_S = 10.0  # an engine ends within a decoding step


def open_group(options: EngineOptions) -> Engine:
    """Opens an engine for a device name that means several devices; `all` of one GPU, or none, needs no process.

    Raises:
        ModelError: There is no such device, or the model cannot be loaded on it.
    """
    is_posix = os.name == "posix"
    if options.device == "all" and not (is_posix and torch.cuda.device_count() > 1):
        return open_engine(options._replace(device="auto"))
    if not is_posix:
        raise ModelError(
            f"device {options.device!r}: engines in several processes need Linux or macOS; name one device"
        )
    return EngineGroup(options, open_devices(options.device))


class EngineGroup:
    """Runs several engines in their own processes as one engine; see `Engine` for the contract.

    A request goes to the process with the least audio in progress. The process's own queue limits how much it takes:
    the next request is sent when the last one was accepted. When one process is lost, the group is: the other
    processes still answer what they have, until the group is closed.
    """

    def __init__(self, options: EngineOptions, devices: list[Device]) -> None:
        """Starts the processes, which load the model concurrently.

        Args:
            options: Options of each engine, except for the device.
            devices: One for each process; released when its process has ended.

        Raises:
            ModelError: The model cannot be loaded in one of them.
        """
        self._changed = threading.Condition()  # guards what follows, and what the members have under way
        self._failure: EngineFailed | None = None
        self._stats = EngineStats()
        self._ids = itertools.count()
        self._model = options.model
        # Left alone, each would take all cores, and all of them together take many times as long.
        threads = max(1, (os.cpu_count() or 1) // len(devices))
        self._members = [
            _Member(options, device, threads if device.torch.type == "cpu" else None) for device in devices
        ]
        for member in self._members:
            member.start(self._take, self._lose)
        try:
            opened = [member.opened for member in self._members]
            wait(opened, return_when=FIRST_EXCEPTION)
            infos = [future.result() for future in opened if future.done()]
        except BaseException:
            self.close()
            raise
        device = ",".join(info.device for info in infos)
        self._info = infos[0]._replace(device=device, slots=sum(info.slots for info in infos))

    @property
    def info(self) -> EngineInfo:
        """The opened model, with the devices and slots of all processes."""
        return self._info

    @property
    def is_open(self) -> bool:
        """Whether all processes still accept requests."""
        return self._failure is None

    @property
    def pids(self) -> tuple[int, ...]:
        """Ids of the processes."""
        return tuple(member.process.pid for member in self._members if member.process)

    def submit(self, request: Request) -> "Future[list[Reply]]":
        """Sends a request to one of the engines; blocks while all queues are full."""
        return self._ask("submit", request)

    def ask_alone(self, request: Request) -> "Future[list[Reply]]":
        """Like `submit`, by unmodified `generate`."""
        return self._ask("ask_alone", request)

    def take_stats(self) -> EngineStats:
        """Returns the statistics of all processes, up to their last reply, since the last call."""
        with self._changed:
            stats, self._stats = self._stats, EngineStats()
        return stats

    def close(self) -> None:
        """Ends the processes and fails unanswered requests. A second call does nothing."""
        with self._changed:
            self._failure = self._failure or EngineFailed(f"the engines of {self._model!r} were closed")
            self._changed.notify_all()
        for member in self._members:
            member.hang_up()
        for member in self._members:
            if member.thread is not threading.current_thread():
                member.thread.join()

    def _ask(self, kind: Literal["submit", "ask_alone"], request: Request) -> "Future[list[Reply]]":
        ask = Ask(next(self._ids), kind, request)
        message = pickle.dumps(ask, pickle.HIGHEST_PROTOCOL)  # before anything depends on it: it may raise
        asked = _Asked(Future(), sum(len(audio) for audio in request.audios), len(request.tasks))
        with self._changed:
            self._changed.wait_for(lambda: self._failure or any(member.accepts for member in self._members))
            if self._failure:
                raise self._failure
            member = min((member for member in self._members if member.accepts), key=_Member.load)
            member.asked[ask.id] = asked
            member.accepts = False
        member.send(message)
        cancel = pickle.dumps(Cancel(ask.id))
        asked.future.add_done_callback(lambda future: member.send(cancel) if future.cancelled() else None)
        return asked.future

    def _take(self, member: "_Member", message: Any) -> None:
        """Handles a message of a process about its requests; runs on its member's thread."""
        with self._changed:
            if isinstance(message, Accepted):
                member.accepts = True
                self._changed.notify_all()
                return
            assert isinstance(message, Done)
            asked = member.asked.pop(message.id)
            self._stats = EngineStats(*map(operator.add, self._stats, message.stats))
            if isinstance(message.result, Failed) and isinstance(message.result.error, EngineFailed):
                self._failure = self._failure or message.result.error
                self._changed.notify_all()
        asked.finish(message.result)

    def _lose(self, member: "_Member", how: str) -> None:
        """Handles the end of a process; runs on its member's thread."""
        with self._changed:
            self._failure = self._failure or EngineFailed(how)
            self._changed.notify_all()
            unanswered, member.asked = member.asked, {}
        for asked in unanswered.values():
            asked.finish(Failed(self._failure, None))


class _Asked(NamedTuple):
    """A request in progress.

    Attributes:
        samples: Number of audio samples.
        prompts: Number of prompts, one for each task.
    """

    future: "Future[list[Reply]]"
    samples: int
    prompts: int

    def finish(self, result: "list[Reply] | Failed | None") -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(result, list):
            self.future.set_result(result)
        else:
            self.future.set_exception(_error(result) if result else EngineFailed("the request was cancelled"))


class _Trace(Exception):
    """Carries the text of a traceback from an engine process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _error(failed: Failed) -> BaseException:
    if failed.trace:
        failed.error.__cause__ = _Trace(failed.trace)
    return failed.error


class _Member:
    """An engine process as its parent sees it, from start to end, on its own thread.

    Attributes:
        opened: Its engine's info, or the error of opening it.
        asked: Its requests in progress, by id.
        accepts: Whether its engine's queue accepted the last request sent.
        process: None until it is started.
    """

    def __init__(self, options: EngineOptions, device: Device, threads: int | None) -> None:
        self.opened: Future[EngineInfo] = Future()
        self.asked: dict[int, _Asked] = {}
        self.accepts = True
        self.process: subprocess.Popen[bytes] | None = None
        self._options = options._replace(device=str(device.torch))
        self._device = device
        self._threads = threads
        self._socket, self._theirs = socket.socketpair()
        self._link = Connection(os.dup(self._socket.fileno()))
        self._sending = threading.Lock()

    def start(self, take: Callable[["_Member", Any], None], lose: Callable[["_Member", str], None]) -> None:
        """Starts the thread, which passes each message to `take`, and the end of the process to `lose`."""
        self.thread = threading.Thread(
            target=self._run, args=(take, lose), name=f"af3pipe-engine-{self._options.device}", daemon=True
        )
        self.thread.start()

    def load(self) -> tuple[int, int]:
        """Samples and prompts in progress."""
        asked = self.asked.values()
        return sum(each.samples for each in asked), sum(each.prompts for each in asked)

    def send(self, message: bytes) -> None:
        """Sends a pickled message; does nothing if the process has ended, which the thread notices."""
        with self._sending, suppress(OSError):
            self._link.send_bytes(message)

    def hang_up(self) -> None:
        """Closes the connection, so that the process ends, and then the thread."""
        with suppress(OSError):  # hung up before
            self._socket.shutdown(socket.SHUT_RDWR)
        if self.process and not self.opened.done():
            self.process.kill()  # it loads, and does not listen

    def _run(self, take: Callable[["_Member", Any], None], lose: Callable[["_Member", str], None]) -> None:
        how = ""
        try:
            # On this thread, because on Linux the process ends with the thread that started it.
            self.process = self._start()
            self.send(pickle.dumps((self._options, _log_levels())))
            while True:
                self._receive(take)
        except (EOFError, ConnectionError):
            pass  # it has ended, or this side hung up
        except Exception as error:  # noqa: BLE001  (whatever it is, nobody may be left waiting)
            how = f"cannot be used any more ({type(error).__name__}: {error})"
        finally:
            self._end()
            how = f"the engine process on {self._options.device} {how or self._how_it_ended()}"
            if not self.opened.done():
                self.opened.set_exception(ModelError(f"{how} while it loaded model {self._options.model!r}"))
            lose(self, how)

    def _start(self) -> "subprocess.Popen[bytes]":
        # What can be imported here can be there: see DecoderProcess.
        path = [os.fspath(entry) for entry in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from af3pipe.models.engine_process import serve; "
        code += f"serve({self._theirs.fileno()})"
        claim = self._device.claim
        with self._theirs:
            return subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a library prints there is no part of this program's output
                # With the claim, so that a GPU is free only when nobody computes on it any more.
                pass_fds=(self._theirs.fileno(), *([claim.fd] if claim else ())),
                env={**({"OMP_NUM_THREADS": str(self._threads)} if self._threads else {}), **os.environ},
            )

    def _receive(self, take: Callable[["_Member", Any], None]) -> None:
        message = self._link.recv()
        if isinstance(message, logging.LogRecord):
            logger = logging.getLogger(message.name)
            if logger.isEnabledFor(message.levelno):
                logger.handle(message)
        elif isinstance(message, Opened):
            self.opened.set_result(message.info)
        elif isinstance(message, Failed):
            self.opened.set_exception(_error(message))
        else:
            take(self, message)

    def _end(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self.process:
            try:
                self.process.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                with suppress(subprocess.TimeoutExpired):  # one that waits for a device ends when that answers
                    self.process.wait(_CLOSE_S)
        with self._sending:
            self._link.close()
        self._socket.close()
        self._device.release()

    def _how_it_ended(self) -> str:
        code = self.process.returncode if self.process else None
        if code is None or code >= 0:
            return f"ended with exit status {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"died of {name}" + (", which the system sends where memory is short," if name == "SIGKILL" else "")


def _log_levels() -> dict[str, int]:
    """Returns the levels of all loggers that set their own, by name; the root logger's name is empty."""
    loggers = {name: logger for name, logger in logging.root.manager.loggerDict.items() if name}
    levels = {name: logger.level for name, logger in loggers.items() if isinstance(logger, logging.Logger)}
    return {"": logging.root.level} | {name: level for name, level in levels.items() if level}
