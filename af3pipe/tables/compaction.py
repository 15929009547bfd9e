"""Begins, commits, finishes and undoes compactions, so that no row is lost if one is killed or considered dead.

Object stores have no locks, so a committing and an undoing process coordinate by two files. The undoing process
writes `<id>.undone`, reads the record again, and deletes new files only if the state is still `writing`. The
committing process writes `committed`, then checks for `<id>.undone`, and deletes old files only if it does not exist.
Whichever writes first, the other sees it. If some new files of a commit are missing, readers use the old ones, which
then exist.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected
from af3pipe.tables.compaction_record import (
    FOLDER,
    Compaction,
    Compactions,
    Which,
    done_compactions,
    identity,
    open_compactions,
    read_again,
)
from af3pipe.tables.heartbeat import age_s, is_undone, process_space, silent_s
from af3pipe.tables.layout import TABLE_SCHEMAS, new_run_id
from af3pipe.tables.prefetch import each

_log = logging.getLogger(__name__)

DEAD_AFTER_S = 3600.0
"""A compaction without a heartbeat for this long is considered dead."""
_REPLACED_KEPT_S = 86_400.0
_LEFTOVERS_KEPT_S = 7 * 86_400.0


class CompactError(Exception):
    """A compaction was not done; nothing was changed. The message says why and what to do."""


def taken_for_dead() -> CompactError:
    """Returns the error for a compaction that another process has undone."""
    return CompactError(
        "another process considered this compaction dead and undid it; nothing is lost: run `af3pipe compact` again"
    )


def recover(output: str, *, dead_after_s: float = DEAD_AFTER_S) -> list[str]:
    """Finishes each dead compaction that had committed, and undoes each that had not.

    Args:
        output: Folder of the tables.
        dead_after_s: A compaction is dead if it had no heartbeat for this long, or if its process was on this machine
            and has ended.

    Returns:
        Ids of the compactions that were finished or undone.

    Raises:
        CompactError: Both new and replaced files of a compaction are lost.
        Rejected, StorageError: The store cannot be used.
        NewerFormat: A later version of af3pipe compacts the output.
    """
    output, ended = storage.canonical(output), []
    compactions = Compactions(output)
    for found in compactions.under_way:
        silent = silent_s(output, found, compactions)
        if silent < dead_after_s:
            continue
        if found.state == "committed":
            marker = storage.name(_undone_uri(output, found))
            if marker in compactions.files and age_s(output, marker, compactions) < dead_after_s:
                continue  # another process is undoing it
            _finish(output, found)
        else:
            if silent != float("inf"):  # else its process has certainly ended
                storage.write_atomic(_undone_uri(output, found), str(time.time()).encode())
                again = read_again(found, output)
                if again is None or again.state != "writing":
                    storage.delete(_undone_uri(output, found))
                    continue
            undo(output, found)
        ended.append(found.compaction_id)
    return ended


def _undone_uri(output: str, found: Compaction) -> str:
    return found.uri_beside(output, "undone")


def begin(output: str) -> Compaction:
    """Writes the record of a new compaction, then checks for others: if two begin at the same time, one sees both.

    Raises:
        CompactError: Another compaction is running.
    """
    record = Compaction(new_run_id(), "writing", time.time(), socket.gethostname(), os.getpid(), process_space())
    record.write(output)
    compactions = Compactions(output)
    others = [found for found in compactions.under_way if found.compaction_id != record.compaction_id]
    if others:
        other = others[0]
        silent = max(silent_s(output, other, compactions), 0.0)
        storage.delete(record.uri(output))
        raise CompactError(
            f"{output} is being compacted by process {other.pid} on {other.host}, which was last seen alive "
            f"{silent / 60:.0f} min ago. Wait for it; if it was killed, run this again once it has not been seen for "
            f"{DEAD_AFTER_S / 60:.0f} min"
        )
    return record


def commit(
    output: str,
    record: Compaction,
    replaced: Mapping[str, str],
    new: Sequence[str],
    dropped: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> None:
    """Makes the new files current with one write, then deletes the files that they replace.

    Args:
        output: Folder of the tables.
        record: The record of the compaction, in state `writing`.
        replaced: See `Compaction`, as for `new` and `dropped`.
        new: See `replaced`.
        dropped: See `replaced`.

    Raises:
        CompactError: Another process has undone the compaction.
        StorageError: The store failed; the next compaction finishes or undoes this one.
    """
    if not is_undone(output, record):
        committed = record._replace(
            state="committed", updated_at=time.time(), replaced=replaced, new=new, dropped=dropped
        )
        committed.write(output)
        if not is_undone(output, record):
            _finish(output, committed)
            return
    undo(output, record)
    raise taken_for_dead()


def undo(output: str, found: Compaction) -> None:
    """Deletes a compaction's new files and its record. Raises Rejected, StorageError."""
    uris = [uri for table in TABLE_SCHEMAS for uri in storage.list_files(storage.join(output, table))]
    for _ in each(storage.delete, filter(found.wrote, uris)):
        pass
    _delete_record(output, found)


def _delete_record(output: str, found: Compaction) -> None:
    for suffix in ("alive", "json"):
        storage.delete(found.uri_beside(output, suffix))


def _finish(output: str, found: Compaction) -> None:
    there = {uri for table in TABLE_SCHEMAS for uri in storage.list_files(storage.join(output, table))}
    current = found.current(output, there, TABLE_SCHEMAS)
    if current is Which.REPLACED:
        undo(output, found)
        return
    if current is Which.BOTH:
        lost = next(uri for uri in (storage.join(output, name) for name in found.new or ()) if uri not in there)
        raise CompactError(
            f"{lost}, which the compaction {found.compaction_id} wrote, is missing, as are files that it replaced: "
            f"restore it; or delete {found.uri(output)}, then all files that still exist are used"
        )
    for name, kept in zip(
        found.replaced, each(lambda item: _kept(output, *item), found.replaced.items()), strict=True
    ):
        if kept:
            _log.warning(
                "%s was written again while it was compacted, so it is kept; the next compaction drops copies", name
            )
    found._replace(state="done", updated_at=time.time()).write(output)
    _delete_record(output, found)


def _kept(output: str, name: str, listed: str | None) -> bool:
    """Deletes a replaced file, unless it has changed since it was listed; returns whether it was kept."""
    uri = storage.join(output, name)
    if listed is not None:
        try:
            if identity(storage.stat(uri)) != listed:
                return True
        except Rejected as rejected:
            if rejected.reason is not Reason.NOT_FOUND:
                raise
            return False
    storage.delete(uri)
    return False


def prune(output: str) -> None:
    """Drops the file lists of compactions that ended over a day ago, and old marker files of killed processes.

    Called by the one running compaction.
    """
    now = time.time()
    for found in done_compactions(output):
        # A reader whose listing is over a day old no longer finds its files.
        if found.replaced and now - found.updated_at > _REPLACED_KEPT_S:
            found._replace(replaced={}, new=()).write(output)
    running = {found.compaction_id for found in open_compactions(output)}
    for info in storage.find_files(storage.join(output, FOLDER)):
        stem, _, suffix = storage.name(info.uri).partition(".")
        if suffix in ("alive", "undone", "clock") and stem not in running and info.mtime is not None:
            age = datetime.now(timezone.utc) - datetime.fromisoformat(info.mtime)
            if age.total_seconds() > _LEFTOVERS_KEPT_S:
                with contextlib.suppress(storage.StorageError):
                    storage.delete(info.uri)
