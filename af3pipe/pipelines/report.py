"""Reports what a run of a job did, for the user and for the run record."""

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
    """Reports what a run did; `verified` is None if no sample was to be verified."""

    run_id: str
    counts: RunCounts
    wall_s: float
    metrics: dict[str, int]
    verified: Verified | None = None

    @property
    def unverified(self) -> str | None:
        """A sentence that says why verification of the answers failed; None if it did not."""
        answers = sum(self.counts.answers.values())
        if self.verified and not self.verified.sampled and answers:
            return f"no request was sampled for verification, although {answers} answers were written"
        return self.verified.problem if self.verified else None

    @property
    def refused(self) -> str | None:
        """A sentence that says why the credentials may be wrong; None if nothing suggests that."""
        if not self.metrics.get("workers_refused"):
            return None
        return (
            "the first 100 recordings that a worker read were all refused (permission_denied): check the "
            "credentials and run the job again, which retries these recordings"
        )


def job_values(job: JobConfig) -> Mapping[str, Any]:
    """Returns the keys and values of a job for the run record, without secrets."""
    values: dict[str, Any] = storage.redact_values(job.model_dump(mode="json"))
    return values


def write_started(job: JobConfig, run_id: str, runner: str | None = None) -> None:
    """Writes the started file of a run."""
    run_record.write_started(job.output, run_id, job_values(job), runner)


def write_record(
    job: JobConfig, checkpoint: Checkpoint | None, runner: str | None, started_at: datetime, report: RunReport
) -> None:
    """Writes the run record of a job."""
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
