"""Passes counts from a pipeline's workers to the process that started it, as small files beside the run record."""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from af3pipe import storage
from af3pipe.transforms.stores import set_storage
from af3pipe.transforms.verify import Verified, total


def found_uri(output: str, run_id: str) -> str:
    """Returns the URI of the file to which the pipeline writes the number of recordings it found."""
    return storage.join(output, "_runs", f"{run_id}.found.json")


class Found(NamedTuple):
    """Counts the recordings that a pipeline found.

    Attributes:
        found: All recordings.
        skipped: Recordings that an earlier run has done.
        kept_dead_letters: Dead letters of the skipped recordings.
    """

    found: int
    skipped: int = 0
    kept_dead_letters: int = 0


def write_found(counts: Mapping[str, int], uri: str, storage_options: storage.StorageOptions) -> None:
    """Writes counts of a pipeline's elements; metrics would count the elements of retried bundles twice."""
    set_storage(storage_options)
    found = Found(*(counts.get(name, 0) for name in Found._fields))
    storage.write_atomic(uri, json.dumps(found._asdict()).encode())


def read_found(output: str, run_id: str) -> Found:
    """Reads the file that `write_found` wrote.

    Raises:
        Rejected: The file does not exist or cannot be read.
    """
    return Found(**json.loads(storage.read_bytes(found_uri(output, run_id))))


def take_found(output: str, run_id: str) -> Found:
    """Reads and deletes the file that `write_found` wrote. Raises Rejected like `read_found`."""
    found = read_found(output, run_id)
    storage.delete(found_uri(output, run_id))
    return found


def verified_uri(output: str, run_id: str, chunk: int) -> str:
    """Returns the URI of the file to which a chunk of the pipeline writes the verification of its sample."""
    return storage.join(output, "_runs", f"{run_id}.verified-{chunk}.json")


def write_verified(verified: Verified, uri: str, storage_options: storage.StorageOptions) -> None:
    """Writes the verification of a sample; called by the pipeline."""
    set_storage(storage_options)
    storage.write_atomic(uri, json.dumps(verified.to_dict(), ensure_ascii=False).encode())


def take_verified(uris: Iterable[str]) -> Verified:
    """Reads and deletes the files that `write_verified` wrote, and merges them.

    Raises:
        Rejected: A file cannot be read.
    """
    parts = []
    for uri in uris:
        parts.append(Verified.from_dict(json.loads(storage.read_bytes(uri))))
        storage.delete(uri)
    return total(parts)
