"""Tells a compaction that runs from one that was killed, whatever it does at the time and whatever clocks say.

A thread of the compaction writes `_compactions/<id>.alive` every minute, however long one file takes. Others compare
the time that the store gave to that file with the time that it gives to one of their own: the clock of no machine
decides, but that of the store.
"""

import logging
import os
import socket
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path
from types import TracebackType

from af3pipe import storage
from af3pipe.schemas import Rejected
from af3pipe.storage import StorageError
from af3pipe.tables.compaction_record import FOLDER, Compaction, Compactions

_log = logging.getLogger(__name__)

BEAT_S = 60.0


class Heartbeat:
    """Writes that a compaction is alive while the context lasts, from a thread of its own.

    Args:
        output: Folder of the tables.
        record: Of the compaction.
        every_s: How long a pause.

    Attributes:
        lost: Set once another process has taken the compaction for dead.
    """

    def __init__(self, output: str, record: Compaction, every_s: float = BEAT_S) -> None:
        self.lost = threading.Event()
        self._output = output
        self._record = record
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="af3pipe-alive", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                if is_undone(self._output, self._record):
                    self.lost.set()
                    return
                storage.write_atomic(self._record.uri_beside(self._output, "alive"), str(time.time()).encode())
            except (StorageError, Rejected) as error:
                _log.warning("the compaction cannot write that it is alive, and tries again: %s", error)


def is_undone(output: str, record: Compaction) -> bool:
    """Whether a process has taken a compaction for dead. Raises Rejected, StorageError."""
    return bool(storage.find_files(storage.join(output, FOLDER), f"{record.compaction_id}.undone"))


def process_space() -> str:
    """Names the space of process ids that this process is in, as each container has its own; "" where unknown."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def silent_s(output: str, found: Compaction, compactions: Compactions) -> float:
    """For how many seconds a compaction has not written that it is alive; infinite if its process is gone.

    Raises:
        Rejected, StorageError: The store cannot be used.
    """
    is_of_here = found.host == socket.gethostname() and found.process_space in ("", process_space())
    if is_of_here and not _runs_here(found.pid):
        return float("inf")
    names = (storage.name(found.uri(output)), storage.name(found.uri_beside(output, "alive")))
    times = [compactions.files[name].mtime for name in names if name in compactions.files]
    written = [datetime.fromisoformat(mtime).timestamp() for mtime in times if mtime is not None]
    now = _now(output) if written else None
    return time.time() - found.updated_at if now is None else now - max(written)


def age_s(output: str, name: str, compactions: Compactions) -> float:
    """How old a file of `_compactions/` is, in seconds by the store's clock; infinite where the store has none."""
    mtime, now = compactions.files[name].mtime, _now(output)
    return float("inf") if mtime is None or now is None else now - datetime.fromisoformat(mtime).timestamp()


def _now(output: str) -> float | None:
    """The time by the clock of the store; None where it has none."""
    probe = storage.join(output, FOLDER, f"{uuid.uuid4().hex}.clock")
    storage.write_atomic(probe, b"")
    try:
        mtime = storage.stat(probe).mtime
    finally:
        storage.delete(probe)
    return None if mtime is None else datetime.fromisoformat(mtime).timestamp()


def _runs_here(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
