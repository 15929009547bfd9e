"""Starts detached runs on remote workers, and finalizes them when they are done."""

import time
from collections.abc import Iterable
from datetime import datetime, timezone

from apache_beam.options.pipeline_options import StandardOptions

from af3pipe import storage
from af3pipe.models.engine import ModelError
from af3pipe.models.family import open_checkpoint
from af3pipe.pipelines import graph
from af3pipe.pipelines.batch import RunFailed, preflight, warn_unfinished
from af3pipe.pipelines.beam_flags import beam_options
from af3pipe.pipelines.handover import read_found, take_found, take_verified, verified_uri
from af3pipe.pipelines.job import JobConfig, JobError, make_job
from af3pipe.pipelines.report import RunReport, write_record, write_started
from af3pipe.runners.check import runner_of
from af3pipe.runners.pipeline import new_pipeline
from af3pipe.schemas import Rejected
from af3pipe.tables.layout import new_run_id
from af3pipe.tables.reconcile import count_run
from af3pipe.tables.run_record import read_started, started_uri
from af3pipe.tables.write import fill_empty_tables
from af3pipe.transforms.stores import set_storage


def submit(job: JobConfig, beam_flags: Iterable[str] = ()) -> str:
    """Starts a job without waiting for it, as the launcher of a Dataflow Flex Template must.

    Returns:
        The run id. `finish` finalizes the run when the runner reports that the job is done.

    Raises:
        JobError, ModelError: A check failed before anything was started.
    """
    options = beam_options(job, list(beam_flags))
    runner = options.view_as(StandardOptions).runner
    if runner_of(options).is_in_process:
        raise JobError(f"runner is {runner!r}, which ends with this program; choose one on which the job continues")
    set_storage(job.storage_options)
    checkpoint = preflight(job, options)
    # A branch may move while the run lasts: every worker uses the commit that was checked here.
    pinned = {"revision": checkpoint.revision} if checkpoint and not checkpoint.path else {}
    run_id = new_run_id()
    try:
        pipeline = new_pipeline(options)
        graph.build(pipeline, job.model_copy(update=pinned), run_id)
        warn_unfinished(job)
        write_started(job, run_id, runner)
        try:
            pipeline.run()
        except Exception:
            storage.delete(started_uri(job.output, run_id))
            raise
    except ValueError as error:  # Beam's own check of its options
        raise JobError(str(error)) from error
    return run_id


def finish(output: str, run_id: str) -> tuple[JobConfig, RunReport]:
    """Verifies the counts of a detached run and writes its run record.

    Raises:
        JobError: The output has no unfinished run of this id.
        RunFailed: The counts do not reconcile, most likely because the run is still running: nothing is written.
        StorageError, Rejected: The output cannot be read or written.
    """
    try:
        started = read_started(output, run_id)
    except Rejected as rejected:
        raise JobError(
            f"{output} has no unfinished run {run_id}: it is finished already, or was never started "
            f"({rejected.detail})"
        ) from rejected
    job = make_job(started["job"] | {"output": output}, f"the job of run {run_id}")
    try:
        counts = count_run(output, run_id, *read_found(output, run_id))
        wants_verified = job.verify_sample and counts.reconciled
        verified = take_verified([verified_uri(output, run_id, 0)]) if wants_verified else None
    except Rejected as rejected:
        raise RunFailed(f"run {run_id} is not complete yet: {rejected.detail}") from rejected
    if not counts.reconciled:
        raise RunFailed(
            f"run {run_id} is still running, or rows of it were lost: {'; '.join(counts.problems)}. Check whether "
            "the runner reports the job as done; if so, run the job again with the same output"
        )
    started_at = datetime.fromisoformat(started["started_at"])
    report = RunReport(run_id, counts, time.time() - started_at.timestamp(), {}, verified)
    fill_empty_tables(output, job.tables(), run_id, job.partition_by)
    try:
        checkpoint = open_checkpoint(job.model, job.revision)
    except ModelError:  # only the workers have it
        checkpoint = None
    write_record(job, checkpoint, started["runner"], started_at.astimezone(timezone.utc), report)
    take_found(output, run_id)
    return job, report
