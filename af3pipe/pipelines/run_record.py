"""What a run leaves of itself in `_runs/`: that it began, and in the end all that is to be known of it."""

import json
import os
import platform
import re
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from af3pipe import storage
from af3pipe.models.engine import ModelError
from af3pipe.models.family import Checkpoint, model_revision
from af3pipe.pipelines.job import JobConfig
from af3pipe.schemas import Reason, Rejected
from af3pipe.tables.layout import run_files
from af3pipe.tables.reconcile import RunCounts
from af3pipe.transforms.verify import Verified

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


class RunReport(NamedTuple):
    """What a run did; `verified` is None where nothing was to be verified."""

    run_id: str
    counts: RunCounts
    wall_s: float
    metrics: dict[str, int]
    verified: Verified | None = None

    @property
    def unverified(self) -> str | None:
        """Why the run's answers are not to be trusted, in a sentence; None where nothing speaks against them."""
        answers = sum(self.counts.answers.values())
        if self.verified and not self.verified.sampled and answers:
            return f"no request was drawn to be asked again, and yet {answers} answers are written"
        return self.verified.problem if self.verified else None


def record_uri(output: str, run_id: str) -> str:
    """Where the record of a finished run is."""
    return storage.join(output, "_runs", f"{run_id}.json")


def started_uri(output: str, run_id: str) -> str:
    """Where a run that has not finished says that it began."""
    return storage.join(output, "_runs", f"{run_id}{_STARTED}")


def stop_uri(output: str, run_id: str) -> str:
    """A file that stops a watching run when it is there, whatever is in it."""
    return storage.join(output, "_runs", f"{run_id}.stop")


def ended_uri(output: str, run_id: str) -> str:
    """A file by which a watching run says that all is written, on a runner that goes on after that."""
    return storage.join(output, "_runs", f"{run_id}.ended")


def write_started(job: JobConfig, run_id: str, runner: str | None = None) -> None:
    """Written before anything else of the run: whoever finds it alone knows that the run goes on, or was killed."""
    record = {
        "run_id": run_id,
        "started_at": _now(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "runner": runner,
        "job": storage.redact_values(job.model_dump(mode="json")),
    }
    _write(started_uri(job.output, run_id), record)


def read_started(output: str, run_id: str) -> dict[str, Any]:
    """What a run that has not finished said when it began.

    Raises:
        Rejected: There is none of this id.
    """
    found: dict[str, Any] = json.loads(storage.read_bytes(started_uri(output, run_id)))
    return found


def read_job(output: str, run_id: str) -> dict[str, Any]:
    """What a run was asked: the keys of its job, without secrets.

    Raises:
        Rejected: Neither its record nor what it said when it began is there.
    """
    try:
        record = storage.read_bytes(record_uri(output, run_id))
    except Rejected:
        record = storage.read_bytes(started_uri(output, run_id))
    job: dict[str, Any] = json.loads(record)["job"]
    return job


def unfinished_runs(output: str) -> Iterator[dict[str, Any]]:
    """What runs that have not finished said when they began; none that a run begun later has completed since."""
    uris = storage.list_files(storage.join(output, "_runs"))
    finished = max((uri.removesuffix(".json") for uri in uris if _RECORD.search(uri)), default="")
    for uri in uris:
        if uri.endswith(_STARTED) and uri.removesuffix(_STARTED) > finished:
            try:
                yield json.loads(storage.read_bytes(uri))
            except Rejected as rejected:
                if rejected.reason is not Reason.NOT_FOUND:  # else it has finished since
                    raise


def write_record(
    job: JobConfig, checkpoint: Checkpoint | None, runner: str | None, started_at: datetime, report: RunReport
) -> None:
    """The run's own record, written last: who finds it knows that the run is complete."""
    counts = report.counts
    record = {
        "run_id": report.run_id,
        "started_at": started_at.isoformat(timespec="seconds"),
        "finished_at": _now(),
        "wall_s": round(report.wall_s, 3),
        "job": storage.redact_values(job.model_dump(mode="json")),
        "runner": runner,
        "model": _model_record(job, checkpoint),
        "versions": _versions(),
        "recordings_found": counts.found,
        "recordings": counts.states,
        "answers": counts.answers,
        "dead_letters": counts.dead_letters,
        "kept_dead_letters": counts.kept_dead_letters,
        "audio_s": round(counts.audio_s, 3),
        "reconciled": counts.reconciled,
        "problems": list(counts.problems),
        "verified": report.verified.to_dict() if report.verified else None,
        "counters": report.metrics,
        "files": run_files(job.output, report.run_id),
    }
    _write(record_uri(job.output, report.run_id), record)
    storage.delete(started_uri(job.output, report.run_id))


def _write(uri: str, record: dict[str, Any]) -> None:
    storage.write_atomic(uri, json.dumps(record, indent=1, ensure_ascii=False).encode())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _model_record(job: JobConfig, checkpoint: Checkpoint | None) -> dict[str, str | None]:
    chosen = {"adapter": job.adapter, "quantize": job.quantize}
    if checkpoint is None:  # the answers' own columns say which it was
        return {"id": job.model, "revision": job.revision, "family": None, "licence": None, **chosen}
    try:
        revision: str | None = model_revision(checkpoint, job.adapter, job.quantize)
    except ModelError:  # only the workers have the adapter
        revision = None
    return {
        "id": checkpoint.model_id,
        "revision": revision,
        "family": checkpoint.family,
        "licence": checkpoint.licence,
        **chosen,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "af3pipe": version("af3pipe")}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a launcher needs no torch
            found[name] = "not installed"
    return found
