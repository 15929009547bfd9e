"""Processes of our own that are killed with SIGKILL after their n-th write or delete, as a power cut would."""

import os
import signal
import threading
from collections.abc import Callable

from af3pipe import storage


def killed_after(number: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a forked child that is killed after so many writes and deletes; whether it was."""
    pid = os.fork()
    if pid == 0:
        _kill_me_after(number)
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must not go on with the parent's tests
            os._exit(2)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


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
