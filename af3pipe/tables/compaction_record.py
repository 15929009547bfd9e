"""Reads and writes compaction records, which say which Parquet files of an output are current.

A compaction writes its record below `_compactions/` before anything else. While it is `writing`, readers ignore its
new files. One write makes it `committed`: from then on readers ignore the replaced files, which are then deleted. At
the end a record `<id>.done.json` stays, which counts the dropped rows.

Two more files may be next to the record: the running compaction rewrites `<id>.alive` every minute; a process that
considers it dead, and deletes its new files, writes `<id>.undone`.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected
from af3pipe.storage import ObjectInfo
from af3pipe.tables.formats import check_format
from af3pipe.tables.layout import FORMAT
from af3pipe.tables.prefetch import each

FOLDER = "_compactions"
_COMPACTED = "compacted-"


class Which(Enum):
    """Says which files of a compaction to read: its new files, the files that they replace, or both."""

    NEW = "new"
    REPLACED = "replaced"
    BOTH = "both"


class Compaction(NamedTuple):
    """Is the record of a compaction.

    Attributes:
        compaction_id: Part of the names of its new files, after `compacted-`.
        state: `writing`, `committed` or `done`.
        updated_at: Seconds since 1970 UTC, by the clock of its machine: when the record was written.
        host: Of the process that compacts.
        pid: Of that process.
        process_space: Distinguishes containers of one host; "" if unknown.
        replaced: Files below the output whose rows are in the new ones, each with its identity when it was listed
            (None in records of format 1): a file that was written again since is not the one that was replaced.
        new: The new files, below the output; None in records of format 1.
        dropped: By run, the number of rows that were dropped, with the keys of the run record's counts.
        format: Format version of the tables.
    """

    compaction_id: str
    state: str
    updated_at: float
    host: str
    pid: int
    process_space: str = ""
    replaced: Mapping[str, str | None] = MappingProxyType({})
    new: Sequence[str] | None = None
    dropped: Mapping[str, Mapping[str, Mapping[str, int]]] = MappingProxyType({})
    format: int = FORMAT

    def uri(self, output: str) -> str:
        """Returns the URI of the record."""
        return self.uri_beside(output, "done.json" if self.state == "done" else "json")

    def uri_beside(self, output: str, suffix: str) -> str:
        """Returns the URI of the file next to the record that has the compaction's id and this suffix."""
        return storage.join(output, FOLDER, f"{self.compaction_id}.{suffix}")

    def file_name(self, number: int) -> str:
        """Returns the name of a new file."""
        return f"{_COMPACTED}{self.compaction_id}-{number:05}.parquet"

    def wrote(self, uri: str) -> bool:
        """Returns whether the compaction wrote this file."""
        return storage.name(uri).startswith(f"{_COMPACTED}{self.compaction_id}-")

    def has_replaced(self, output: str, info: ObjectInfo) -> bool:
        """Returns whether the compaction replaced this file, and the file was not written again since."""
        name = info.uri.removeprefix(storage.join(output, ""))
        return name in self.replaced and self.replaced[name] in (None, identity(info))

    def current(self, output: str, uris: Collection[str], tables: Iterable[str]) -> Which:
        """Returns which files to read: as the state says, unless an undo was in progress at the commit.

        An undo deletes new files, and then no replaced file has been deleted. If both sets are incomplete, files were
        lost in another way, and all remaining ones are read.

        Args:
            output: Folder of the tables.
            uris: All existing files of `tables`.
            tables: The tables to check.
        """
        if self.state != "committed":
            return Which.REPLACED
        known = tuple(f"{table}/" for table in tables)
        new, replaced = (
            all(storage.join(output, name) in uris for name in names if name.startswith(known))
            for names in (self.new or (), self.replaced)
        )
        return Which.NEW if new else Which.REPLACED if replaced else Which.BOTH

    def write(self, output: str) -> None:
        """Writes the record. Raises StorageError."""
        values = self._asdict() | {"replaced": dict(self.replaced), "dropped": dict(self.dropped)}
        storage.write_atomic(self.uri(output), json.dumps(values, indent=1).encode())


def identity(info: ObjectInfo) -> str:
    """Returns a text that changes when the file is written again: its etag, else size and modification time."""
    return info.etag or f"{info.size_bytes} {info.mtime}"


def is_compacted(uri: str) -> bool:
    """Returns whether a compaction wrote a file, by its name."""
    return storage.name(uri).startswith(_COMPACTED)


class Compactions:
    """Lists the compactions of an output at one moment.

    Args:
        output: Folder of the tables.

    Attributes:
        under_way: Compactions that are running or were killed.
        done: Ids of finished compactions.
        files: All files of `_compactions/`, by name.

    Raises:
        NewerFormat: A later version of af3pipe compacts or compacted the output.
    """

    def __init__(self, output: str) -> None:
        self.files = {storage.name(info.uri): info for info in storage.find_files(storage.join(output, FOLDER))}
        self.done = {name.removesuffix(".done.json") for name in self.files if name.endswith(".done.json")}
        records = [name for name in self.files if name.endswith(".json") and not name.endswith(".done.json")]
        found = (_read(self.files[name]) for name in records)
        self.under_way = [record for record in found if record is not None]

    @property
    def states(self) -> frozenset[tuple[str, str]]:
        """A value that changes whenever a compaction begins, commits or ends."""
        return frozenset(
            [(found.compaction_id, found.state) for found in self.under_way] + [(i, "") for i in self.done]
        )

    def readable(self, output: str, files: Mapping[str, Sequence[ObjectInfo]]) -> dict[str, list[ObjectInfo]]:
        """Returns the current ones of these files: no row is in two of them because of a compaction."""
        uris = {info.uri for infos in files.values() for info in infos}
        which = [(found, found.current(output, uris, files)) for found in self.under_way]
        committed = [found for found, current in which if current is Which.NEW]
        writing = [found for found, current in which if current is Which.REPLACED]
        return {
            table: [
                info
                for info in infos
                if not any(found.has_replaced(output, info) for found in committed)
                and not any(found.wrote(info.uri) for found in writing)
            ]
            for table, infos in files.items()
        }


def open_compactions(output: str) -> list[Compaction]:
    """Reads the records of compactions that are running or were killed."""
    return Compactions(storage.canonical(output)).under_way


def done_compactions(output: str) -> list[Compaction]:
    """Reads the records of finished compactions."""
    files = storage.find_files(storage.join(storage.canonical(output), FOLDER))
    return [found for found in each(_read, (info for info in files if info.uri.endswith(".done.json"))) if found]


def read_again(found: Compaction, output: str) -> Compaction | None:
    """Reads a record again; returns None if it was deleted."""
    return _read(ObjectInfo(found.uri(output), None, None, None))


def _read(info: ObjectInfo) -> Compaction | None:
    try:
        values: dict[str, Any] = json.loads(storage.read_bytes(info.uri))
    except Rejected as rejected:
        if rejected.reason is Reason.NOT_FOUND:
            return None  # it has just ended
        raise
    check_format(info, values.get("format"))
    values.setdefault("format", 1)
    if isinstance(values.get("replaced"), list):
        values["replaced"] = dict.fromkeys(values["replaced"])
    return Compaction(**{name: value for name, value in values.items() if name in Compaction._fields})
