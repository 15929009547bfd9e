"""Recognizes files of an af3pipe output, so that no run uses them as input."""

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
# Columns of files without the key: older ones, and rewritten ones. No manifest has all columns of one of these sets.
_TABLES = (
    frozenset({"recording_id", "answer_key", "task", "run_id"}),
    frozenset({"recording_id", "terminal_state", "run_id"}),
    frozenset({"recording_id", "dead_letter_key", "run_id"}),
)
_log = logging.getLogger(__name__)


def is_own_table(schema: Any) -> bool:
    """Returns whether an Arrow schema is that of an output table: by its format key, else by its columns."""
    return FORMAT_KEY in (schema.metadata or {}) or any(table.issubset(schema.names) for table in _TABLES)


def is_own_record(uri: str) -> bool:
    """Returns whether a file is a run record or compaction record: any file in their folders, except audio."""
    is_audio = storage.name(uri).rpartition(".")[2].lower() in storage.AUDIO_EXTENSIONS
    return storage.name(storage.parent(uri)) in _RECORD_FOLDERS and not is_audio


def excluded(name: str, outputs: Sequence[str]) -> list[str]:
    """Returns the folders to exclude when an input is listed.

    Args:
        name: An input: a file, a folder or a glob.
        outputs: Output folders. An output below the input is excluded as a whole; if the input is the output or is
            inside it, only the folders that af3pipe writes are excluded.
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
    """Returns the error for a file of an output that was given as an input."""
    detail = (
        f"{uri} belongs to an output of af3pipe and is no input. To process its failures again, run "
        "`af3pipe redrive`; to ask more about its recordings, write their URIs to a new manifest"
    )
    return Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, detail)


def skip_own_file(uri: str) -> Iterator[Any]:
    """Yields nothing for an output file in a folder or glob: counts it, and logs the first one of each folder."""
    metrics.count("own_files_skipped")
    _warn(storage.parent(uri))
    yield from ()


@functools.lru_cache(1024)
def _warn(folder: str) -> None:
    _log.warning("skipped the files in %s: the output of af3pipe is no input", folder)


def refuse_own_file(uri: str) -> Iterator[Any]:
    """Raises `own_file` when it is iterated."""
    yield from ()
    raise own_file(uri)
