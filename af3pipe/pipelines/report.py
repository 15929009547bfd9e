"""Reports a run of a job: what it did, for the person who started it, and for its record."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from af3pipe import storage
from af3pipe.models.engine import ModelError
from af3pipe.models.family import Checkpoint, model_revision
from af3pipe.pipelines.job import JobConfig
from af3pipe.tables import run_record
from af3pipe.tables.reconcile import RunCounts
from af3pipe.transforms.verify import Verified


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

    @property
    def refused(self) -> str | None:
        """Why the run may have had the wrong credentials, in a sentence; None where nothing says so."""
        if not self.metrics.get("workers_refused"):
            return None
        return (
            "the first 100 recordings that a worker read were all refused (permission_denied): check the "
            "credentials, and run the same again, which tries them again"
        )


def job_values(job: JobConfig) -> Mapping[str, Any]:
    """The job's keys as records have them: without secrets."""
    values: dict[str, Any] = storage.redact_values(job.model_dump(mode="json"))
    return values


def write_started(job: JobConfig, run_id: str, runner: str | None = None) -> None:
    """Writes that a job's run has started."""
    run_record.write_started(job.output, run_id, job_values(job), runner)


def write_record(
    job: JobConfig, checkpoint: Checkpoint | None, runner: str | None, started_at: datetime, report: RunReport
) -> None:
    """Writes the record of a job's run."""
    record = {
        "started_at": started_at.isoformat(timespec="seconds"),
        "wall_s": round(report.wall_s, 3),
        "job": job_values(job),
        "runner": runner,
        "model": _model_record(job, checkpoint),
        "verified": report.verified.to_dict() if report.verified else None,
        "counters": report.metrics,
    }
    run_record.write_record(job.output, report.run_id, record, report.counts)


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
