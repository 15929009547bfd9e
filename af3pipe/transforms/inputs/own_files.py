"""Recognises the files of an af3pipe output, so that no run takes them for its input."""

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.tables.layout import FORMAT_KEY, TABLE_SCHEMAS
from af3pipe.transforms import metrics

_RECORD_FOLDERS = ("_runs", "_compactions")
# Of files without the key: older ones, and those that something else wrote again. No manifest has all of one row.
_TABLES = (
    frozenset({"recording_id", "answer_key", "task", "run_id"}),
    frozenset({"recording_id", "terminal_state", "run_id"}),
    frozenset({"recording_id", "dead_letter_key", "run_id"}),
)
_log = logging.getLogger(__name__)


def is_own_table(schema: Any) -> bool:
    """Returns whether an Arrow schema is that of a table of an output: by the footer's key, else by its columns."""
    return FORMAT_KEY in (schema.metadata or {}) or any(table.issubset(schema.names) for table in _TABLES)


def is_own_record(uri: str) -> bool:
    """Returns whether a name is that of a run's or a compaction's record: what is in their folders, but audio."""
    is_audio = storage.name(uri).rpartition(".")[2].lower() in storage.AUDIO_EXTENSIONS
    return storage.name(storage.parent(uri)) in _RECORD_FOLDERS and not is_audio


def excluded(name: str, outputs: Sequence[str]) -> list[str]:
    """Returns the folders of which nothing is an input.

    Args:
        name: An input: a file, a folder or a glob.
        outputs: Folders of outputs. One below the input is left out as a whole; of one that the input is in, or is,
            only what af3pipe writes.
    """
    begins = storage.canonical(re.split(r"[*?\[]", name, maxsplit=1)[0]).rstrip("/")
    folders = []
    for output in map(storage.canonical, outputs):
        if output != begins and output.startswith(begins):
            folders.append(output)
        else:
            folders += [storage.join(output, folder) for folder in (*TABLE_SCHEMAS, *_RECORD_FOLDERS)]
    return folders


def own_file(uri: str) -> Rejected:
    """Returns the error for an output that was named as an input."""
    detail = (
        f"{uri} belongs to an output of af3pipe and is no input. To process its failures again, run "
        "`af3pipe redrive`; to ask more about its recordings, write their URIs into a manifest of your own"
    )
    return Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, detail)


def skip_own_file(uri: str) -> Iterator[Any]:
    """Yields nothing, for an output that a folder or a glob matched: counts it, and logs the first of each folder."""
    metrics.count("own_files_skipped")
    _warn(storage.parent(uri))
    yield from ()


@functools.lru_cache(1024)
def _warn(folder: str) -> None:
    _log.warning("skipped what is in %s: the output of af3pipe is no input", folder)


def refuse_own_file(uri: str) -> Iterator[Any]:
    """Raises `own_file` when it is iterated."""
    yield from ()
    raise own_file(uri)
