"""Passes counts from a pipeline's workers to the process that started it, as small files beside the run record."""

import json
from collections.abc import Iterable

from af3pipe import storage
from af3pipe.transforms.stores import set_storage
from af3pipe.transforms.verify import Verified, total


def found_uri(output: str, run_id: str) -> str:
    """Where the pipeline leaves the number of recordings it found."""
    return storage.join(output, "_runs", f"{run_id}.found.json")


def write_found(found: int, uri: str, storage_options: storage.StorageOptions) -> None:
    """Where a pipeline counts what it finds: from its elements, since metrics count retries twice."""
    set_storage(storage_options)
    storage.write_atomic(uri, json.dumps({"recordings_found": found}).encode())


def take_found(output: str, run_id: str) -> int:
    """What `write_found` wrote, and gone from there.

    Raises:
        Rejected: It cannot be read.
    """
    uri = found_uri(output, run_id)
    found: int = json.loads(storage.read_bytes(uri))["recordings_found"]
    storage.delete(uri)
    return found


def verified_uri(output: str, run_id: str, chunk: int) -> str:
    """Where the pipeline leaves what became of the sample that was asked again; a run has one for each chunk."""
    return storage.join(output, "_runs", f"{run_id}.verified-{chunk}.json")


def write_verified(verified: Verified, uri: str, storage_options: storage.StorageOptions) -> None:
    """Called in the pipeline."""
    set_storage(storage_options)
    storage.write_atomic(uri, json.dumps(verified.to_dict(), ensure_ascii=False).encode())


def take_verified(uris: Iterable[str]) -> Verified:
    """All that `write_verified` wrote there, in one, and gone from there.

    Raises:
        Rejected: One cannot be read.
    """
    parts = []
    for uri in uris:
        parts.append(Verified.from_dict(json.loads(storage.read_bytes(uri))))
        storage.delete(uri)
    return total(parts)
