"""Writes and reads the files of a run in `_runs/`: the started file, and at the end the run record."""

import json
import os
import platform
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from af3pipe import storage
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.tables.reader import files_of_run
from af3pipe.tables.reconcile import RunCounts, count_run, read_rows
from af3pipe.tables.write import fill_empty_tables

_PACKAGES = (
    "apache-beam",
    "torch",
    "transformers",
    "peft",
    "torchao",
    "pyarrow",
    "soundfile",
    "av",
    "soxr",
    "fsspec",
)
_STARTED = ".started.json"
_RECORD = re.compile(r"/[^/.]+\.json$")


def record_uri(output: str, run_id: str) -> str:
    """Returns the URI of the run record, which exists once the run has finished."""
    return storage.join(output, "_runs", f"{run_id}.json")


def started_uri(output: str, run_id: str) -> str:
    """Returns the URI of the started file, which a run writes first and deletes when it has finished."""
    return storage.join(output, "_runs", f"{run_id}{_STARTED}")


def stop_uri(output: str, run_id: str) -> str:
    """Returns the URI of the file whose existence stops a watch, whatever its content."""
    return storage.join(output, "_runs", f"{run_id}.stop")


def ended_uri(output: str, run_id: str) -> str:
    """Returns the URI of a watch's completion signal: the file is written when everything else is."""
    return storage.join(output, "_runs", f"{run_id}.ended")


def write_started(output: str, run_id: str, job: Mapping[str, Any], runner: str | None = None) -> None:
    """Writes the started file of a run. While there is no run record, the run is in progress or was killed."""
    record = {
        "run_id": run_id,
        "started_at": now_text(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "runner": runner,
        "job": job,
    }
    _write(started_uri(output, run_id), record)


def read_started(output: str, run_id: str) -> dict[str, Any]:
    """Reads the started file of a run that has not finished.

    Raises:
        Rejected: There is no unfinished run of this id.
    """
    found: dict[str, Any] = json.loads(storage.read_bytes(started_uri(output, run_id)))
    return found


def read_job(output: str, run_id: str) -> dict[str, Any]:
    """Reads the job of a run, without secrets.

    Raises:
        Rejected: The run has neither a run record nor a started file, or it was no job.
    """
    try:
        record = storage.read_bytes(record_uri(output, run_id))
    except Rejected:
        record = storage.read_bytes(started_uri(output, run_id))
    job: dict[str, Any] = json.loads(record)["job"]
    if not job:
        raise Rejected(Stage.READ, Reason.NOT_FOUND, f"run {run_id} was a pipeline of its own, not a job")
    return job


def unfinished_runs(output: str) -> Iterator[dict[str, Any]]:
    """Reads the started files of unfinished runs, except those older than the newest finished run."""
    uris = storage.list_files(storage.join(output, "_runs"))
    finished = max((uri.removesuffix(".json") for uri in uris if _RECORD.search(uri)), default="")
    for uri in uris:
        if uri.endswith(_STARTED) and uri.removesuffix(_STARTED) > finished:
            try:
                yield json.loads(storage.read_bytes(uri))
            except Rejected as rejected:
                if rejected.reason is not Reason.NOT_FOUND:  # else it has finished since
                    raise


def write_record(output: str, run_id: str, record: Mapping[str, Any], counts: RunCounts) -> str:
    """Writes the run record and returns its URI. Written last: its existence means that the run is complete.

    Args:
        output: Output folder of the run.
        run_id: The run.
        record: Values beside the counts and versions.
        counts: What the run found and wrote.
    """
    known = {
        "run_id": run_id,
        "started_at": None,
        "finished_at": now_text(),
        "wall_s": None,
        "job": {},
        "runner": None,
        "model": None,
        "versions": _versions(),
        "recordings_found": counts.found,
        "recordings": counts.states,
        "answers": counts.answers,
        "dead_letters": counts.dead_letters,
        "kept_dead_letters": counts.kept_dead_letters,
        "audio_s": round(counts.audio_s, 3),
        "reconciled": counts.reconciled,
        "problems": list(counts.problems),
        "verified": None,
        "counters": {},
        "files": files_of_run(output, run_id),
    }
    uri = record_uri(output, run_id)
    _write(uri, {**known, **record})
    storage.delete(started_uri(output, run_id))
    return uri


def write_counted_record(output: str, run_id: str, found: int, partition_by: Sequence[str] = ()) -> str:
    """Counts the rows of a run that has no job file, writes its run record, and returns the record's URI.

    Args:
        output: Output folder of the run.
        run_id: The run.
        found: Number of recordings that the pipeline processed.
        partition_by: Partitions of the tables, used for tables that have no rows yet.
    """
    counts = count_run(output, run_id, found)
    fill_empty_tables(output, counts.answers or ANSWER_TABLES[:1], run_id, partition_by)
    fill_empty_tables(output, ("recordings", "dead_letters"), run_id, partition_by)
    return write_record(output, run_id, {"model": _model_of(output, run_id)}, counts)


def _model_of(output: str, run_id: str) -> dict[str, str] | None:
    """Returns the model recorded in a run's answers; None without answers."""
    files = files_of_run(output, run_id)
    columns = ["model_id", "model_revision", "family"]
    for row in read_rows((uri for table in ANSWER_TABLES for uri in files[table]), columns):
        return {"id": row["model_id"], "revision": row["model_revision"], "family": row["family"]}
    return None


def _write(uri: str, record: dict[str, Any]) -> None:
    storage.write_atomic(uri, json.dumps(record, indent=1, ensure_ascii=False).encode())


def now_text() -> str:
    """Returns the current time as ISO 8601 text in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "af3pipe": version("af3pipe")}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a launcher needs no torch
            found[name] = "not installed"
    return found
