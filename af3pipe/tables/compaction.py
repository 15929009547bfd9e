"""Begins, commits, finishes and undoes compactions, so that none loses a row: killed, slow, or taken for dead.

Who commits and who undoes agree by two files, because stores have no locks. Who undoes a compaction writes
`<id>.undone`, reads the record again, and deletes new files only if that still says `writing`. Who commits writes
`committed`, then looks for `<id>.undone`, and deletes old files only if there is none. Whichever came first, the
other sees it. Where a commit's new files are not all there, readers take the old ones, which then are.
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
"""A compaction that has not written for so long that it is alive is taken to be dead."""
_REPLACED_KEPT_S = 86_400.0
_LEFTOVERS_KEPT_S = 7 * 86_400.0


class CompactError(Exception):
    """Nothing was changed: why, and what to do."""


def taken_for_dead() -> CompactError:
    """The error of a compaction that another process has undone."""
    return CompactError(
        "another process took this compaction for dead and undid it; nothing is lost: run `af3pipe compact` again"
    )


def recover(output: str, *, dead_after_s: float = DEAD_AFTER_S) -> list[str]:
    """Finishes each dead compaction that had committed, and undoes each that had not.

    Args:
        output: Folder of the tables.
        dead_after_s: One is dead that has not written for so long that it is alive, or whose process on this machine
            is gone.

    Returns:
        Their ids.

    Raises:
        CompactError: New and replaced files of one are lost.
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
            marker = storage.name(_marker(output, found))
            if marker in compactions.files and age_s(output, marker, compactions) < dead_after_s:
                continue  # another process is undoing it
            _finish(output, found)
        else:
            if silent != float("inf"):  # else it is certain to write no more
                storage.write_atomic(_marker(output, found), str(time.time()).encode())
                again = read_again(found, output)
                if again is None or again.state != "writing":
                    storage.delete(_marker(output, found))
                    continue
            undo(output, found)
        ended.append(found.compaction_id)
    return ended


def _marker(output: str, found: Compaction) -> str:
    return found.uri_beside(output, "undone")


def begin(output: str) -> Compaction:
    """Writes the record of a compaction, and only then looks for others: of two that begin at once, one sees both.

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
    """Makes the new files the current ones by one write, then deletes the files that they replace.

    Args:
        output: Folder of the tables.
        record: Of the compaction, which is `writing`.
        replaced: As of the record, as `new` and `dropped` are.
        new: See `replaced`.
        dropped: See `replaced`.

    Raises:
        CompactError: Another process has undone the compaction.
        StorageError: The next compaction finishes or undoes this one, as far as it came.
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
            f"{lost} is lost, which the compaction {found.compaction_id} wrote, and so are files that it replaced: "
            f"restore it; or delete {found.uri(output)}, and what is left of both is compacted as it is"
        )
    for name, kept in zip(
        found.replaced, each(lambda item: _kept(output, *item), found.replaced.items()), strict=True
    ):
        if kept:
            _log.warning(
                "%s was written again while it was compacted, and stays; the next compaction drops copies", name
            )
    found._replace(state="done", updated_at=time.time()).write(output)
    _delete_record(output, found)


def _kept(output: str, name: str, listed: str | None) -> bool:
    """Deletes a replaced file, unless it is another by now than the one that was listed; whether it is."""
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
    """Drops what readers need of ended compactions for a day only, and small files that killed processes left.

    Called by the one compaction that is under way.
    """
    now = time.time()
    for found in done_compactions(output):
        # A reader whose listing is older than this day finds its files no more.
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
