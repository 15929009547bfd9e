"""Detects whether a compaction is still running or was killed, without relying on synchronized clocks.

A thread of the compaction writes `_compactions/<id>.alive` every minute, however long a file takes. Other processes
compare that file's modification time with the modification time of a file they have just written: both times are from
the store's clock.
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
    """Writes the heartbeat file of a compaction from a background thread while the context is open.

    Args:
        output: Folder of the tables.
        record: Record of the compaction.
        every_s: Seconds between two heartbeats.

    Attributes:
        lost: Set when another process considers the compaction dead.
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
                _log.warning("the heartbeat of the compaction cannot be written, and is tried again: %s", error)


def is_undone(output: str, record: Compaction) -> bool:
    """Returns whether another process is undoing, or has undone, a compaction. Raises Rejected, StorageError."""
    return bool(storage.find_files(storage.join(output, FOLDER), f"{record.compaction_id}.undone"))


def process_space() -> str:
    """Returns the id of this process's PID namespace, since each container has its own; "" if unknown."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def silent_s(output: str, found: Compaction, compactions: Compactions) -> float:
    """Returns the seconds since a compaction's last heartbeat; infinite if its process has ended.

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
    """Returns the age of a file of `_compactions/` in seconds, by the store's clock; infinite if it has none."""
    mtime, now = compactions.files[name].mtime, _now(output)
    return float("inf") if mtime is None or now is None else now - datetime.fromisoformat(mtime).timestamp()


def _now(output: str) -> float | None:
    """Returns the time by the store's clock; None if the store has no modification times."""
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
