"""Runs a streaming job: processes new recordings from folders and notifications until it is stopped."""

import logging
import time
from collections.abc import Iterable
from datetime import datetime, timezone

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineState

from af3pipe import storage
from af3pipe.pipelines import batch, graph
from af3pipe.pipelines.beam_flags import beam_options
from af3pipe.pipelines.job import JobConfig, JobError
from af3pipe.pipelines.relist import InputError, relist
from af3pipe.pipelines.report import RunReport, write_record, write_started
from af3pipe.runners.check import runner_of
from af3pipe.runners.pipeline import new_pipeline
from af3pipe.runners.runner import RunnerError
from af3pipe.schemas import DeadLetter, Reason, Rejected, TerminalState
from af3pipe.tables.latest import Latest, NotATable, table_files
from af3pipe.tables.layout import new_run_id
from af3pipe.tables.reconcile import count_run
from af3pipe.tables.run_record import ended_uri, started_uri, stop_uri
from af3pipe.tables.write import fill_empty_tables
from af3pipe.transforms import metrics
from af3pipe.transforms.inputs.pubsub import is_subscription, reach, subscription_of
from af3pipe.transforms.inputs.watch import check_watched
from af3pipe.transforms.stores import set_storage

_CHECK_EVERY_S = 2.0
_GRACE_S = 5.0  # other portable runners end by themselves
_log = logging.getLogger(__name__)


class Watch:
    """Starts a streaming run (`af3pipe watch`) and controls it.

    Args:
        job: The job.
        beam_flags: Options for Beam, as on its command line. The default runner is Prism.

    Raises:
        JobError, ModelError: The job is invalid; nothing was started.
        RunFailed: The runner rejected the job.
    """

    def __init__(self, job: JobConfig, beam_flags: Iterable[str] = ()) -> None:
        _check_keys(job)
        options = stream_options(job, list(beam_flags))
        set_storage(job.storage_options)
        self._checkpoint = batch.preflight(job, options, check_inputs=False)
        _check_inputs(job)
        self.run_id = new_run_id()
        self._job = job
        self._runner = runner_of(options)
        self._may_go_on = not self._runner.ends_by_itself  # then this process must detect the end and end the job
        self._checked_at = self._ended_at = 0.0
        self._runner.name_job(self.run_id)
        revision = self._checkpoint.revision if self._checkpoint and not self._checkpoint.path else job.revision
        try:
            pipeline = new_pipeline(options)
            graph.build_stream(
                pipeline, job.model_copy(update={"revision": revision}), self.run_id, signal_end=self._may_go_on
            )
        except ValueError as error:  # Beam's own check of its options
            raise JobError(str(error)) from error
        batch.warn_unfinished(job)
        self._started, self._started_at = time.monotonic(), datetime.now(timezone.utc)
        self._before = metrics.tally()
        write_started(job, self.run_id)
        try:
            self._result = pipeline.run()
        except Exception as error:
            storage.delete(started_uri(job.output, self.run_id))
            raise batch.RunFailed(self._runner.explain_start(batch.explain_failure(error))) from error
        self._is_cancelled = False
        self._background = batch.Background(self._wait)

    def _wait(self) -> None:
        with batch.connected():
            self._result.wait_until_finish()

    def wait(self, seconds: float) -> bool:
        """Waits up to this long; returns whether the run has ended."""
        if not self._background.wait(seconds) and self._may_go_on:
            self._end()
        return self._background.wait(0)

    def _end(self) -> None:
        """Cancels a job that has signalled completion and did not end by itself in time."""
        now = time.monotonic()
        if not self._ended_at and now - self._checked_at > _CHECK_EVERY_S:
            self._checked_at = now
            if _is_there(ended_uri(self._job.output, self.run_id)):
                self._ended_at = now
        if self._ended_at and now - self._ended_at > _GRACE_S:
            self._cancel()
            self._may_go_on = False  # cancel only once

    def _cancel(self) -> None:
        self._result.cancel()
        if self._may_go_on:
            self._runner.cancel_job()

    def progress(self) -> batch.Progress:
        """Returns the progress of the run, as far as this process can see it."""
        return batch.progress(metrics.tally() - self._before, time.monotonic() - self._started)

    def stop(self) -> None:
        """Requests the run to end after it has written everything found so far; returns at once."""
        storage.write_atomic(stop_uri(self._job.output, self.run_id), b"")

    def cancel(self) -> None:
        """Cancels the run now; the next run into the same output processes what was not written."""
        self._is_cancelled = True
        self._cancel()

    def report(self) -> RunReport | None:
        """Returns what the ended run did, and writes its run record; returns None if it was cancelled.

        Raises:
            RunFailed: The pipeline failed.
            StorageError, Rejected: Its rows cannot be counted, or its record cannot be written.
        """
        with batch.connected():
            state = self._result.state
        is_ended = bool(self._ended_at) and not self._is_cancelled
        if self._is_cancelled or (state == PipelineState.CANCELLED and not is_ended):
            self._forget()
            return None
        if not is_ended:
            self._background.result()
            if state not in (PipelineState.DONE, PipelineState.DRAINED):
                raise batch.RunFailed(f"the runner ended the job in state {state}; see its log above")
        job, wall_s = self._job, time.monotonic() - self._started
        counted = batch.counters(self._result)
        counts = count_run(job.output, self.run_id, None, counted["recordings_skipped_done"])
        # A recording counted as done has a row, unless a runner processed it twice or rows were deleted.
        done = sum(counted[f"recordings_{state.value}"] for state in TerminalState)
        if counts.found < done:
            lost = f"{done} recordings were processed, but only {counts.found} are skipped or have a row"
            counts = counts._replace(problems=(*counts.problems, lost))
        report = RunReport(self.run_id, counts, wall_s, dict(sorted(counted.items())))
        fill_empty_tables(job.output, job.tables(), self.run_id, job.partition_by)
        write_record(
            job,
            self._checkpoint,
            self._runner.options.view_as(StandardOptions).runner,
            self._started_at,
            report,
        )
        self._forget()
        _warn_unprocessed(job)
        return report

    def _forget(self) -> None:
        storage.delete(stop_uri(self._job.output, self.run_id))
        storage.delete(ended_uri(self._job.output, self.run_id))


def _is_there(uri: str) -> bool:
    try:
        storage.stat(uri)
    except (Rejected, storage.StorageError):  # which is tried again
        return False
    return True


def _warn_unprocessed(job: JobConfig) -> None:
    """Lists the folders again and warns of files that the stream has not processed."""
    folders = [name for name in job.inputs if not is_subscription(name)]
    if not folders:
        return
    try:
        found = relist(
            Latest(job.output, table_files(job.output)),
            folders,
            channel=job.channel,
            stream=job.stream,
            exclude=[job.output],
        )
    except (InputError, storage.StorageError, NotATable) as error:
        _log.warning("cannot check whether files have not been processed: %s", error)
        return
    for number, example in (found.never, found.changed):
        if number:
            _log.warning(
                "%d files have not been processed in their current version, for example %s: they arrived or changed "
                "after the last listing, or were still being written. The next watch or run into the same output "
                "processes them",
                number,
                example,
            )


def stream_options(job: JobConfig, flags: list[str]) -> PipelineOptions:
    """Returns the Beam options of a streaming run.

    Raises:
        JobError: The runner does not support streaming.
    """
    options = beam_options(job, flags, default_runner="PrismRunner")
    options.view_as(StandardOptions).streaming = True
    try:
        runner_of(options).configure_stream()
    except RunnerError as error:
        raise JobError(str(error)) from error
    return options


def _check_keys(job: JobConfig) -> None:
    """Raises JobError for keys that only batch runs support, rather than ignoring them silently."""
    for key, why in {
        "verify_sample": "a stream has no end at which to draw a sample",
        "chunk_recordings": "a stream writes as it goes",
    }.items():
        if key in job.model_fields_set:
            raise JobError(f"{key} is for `af3pipe run`: {why}")
    if any(map(is_subscription, job.inputs)) and not job.allow_prefixes:
        raise JobError(
            "no URI that messages may reference is allowed: give --allow-prefix (allow_prefixes in a job file), for "
            "example gs://archive"
        )


def _check_inputs(job: JobConfig) -> None:
    """Raises JobError if an input cannot be watched or listed; a folder may be created later."""
    for name in job.inputs:
        try:
            if is_subscription(name):
                reach(subscription_of(name))
                continue
            check_watched(name)
            first = next(graph.found_by(job, name), None)
        except (ValueError, ImportError, storage.StorageError) as error:
            raise JobError(str(error) if name in str(error) else f"input {name}: {error}") from error
        if isinstance(first, DeadLetter) and first.uri == name and first.reason is not Reason.NOT_FOUND:
            raise JobError(f"input {name}: {first.detail}")
