"""Runs processes that kill themselves with SIGKILL after their n-th write or delete, as a power cut would."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping

from af3pipe import storage

# Forked from a process that has imported everything and has one thread. In this one other tests may have left threads
# of gRPC, and a fork of such a process may crash.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.kills", "af3pipe.tables.compact"])


def killed_after(number: int, work: Callable[[], object]) -> bool:
    """Runs `work`, which must be picklable, in a process killed after so many writes and deletes; whether it was."""
    process = _context.Process(target=_work, args=(dict(os.environ), number, work))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def _work(environment: Mapping[str, str], number: int, work: Callable[[], object]) -> None:
    os.environ.update(environment)
    _kill_me_after(number)
    work()


def _kill_me_after(number: int) -> None:
    left = number
    lock = threading.Lock()

    def counted(call):
        def then_die(*args):
            nonlocal left
            with lock:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args)

        return then_die

    storage.write_atomic = counted(storage.write_atomic)
    storage.delete = counted(storage.delete)
