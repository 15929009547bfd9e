"""The streaming pipeline: what lands in folders, or is told of by messages, is answered until it is stopped."""

import logging
import shutil
import time
from collections.abc import Iterable
from datetime import datetime, timezone

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PrismRunnerOptions, StandardOptions
from apache_beam.runners.runner import PipelineState

from af3pipe import storage
from af3pipe.pipelines import batch, graph
from af3pipe.pipelines.accounting import count_run, fill_empty_tables
from af3pipe.pipelines.job import JobConfig, JobError, beam_options
from af3pipe.pipelines.record import RunReport, started_uri, stop_uri, write_record, write_started
from af3pipe.pipelines.relist import InputError, relist
from af3pipe.pipelines.runners import FlinkOptions
from af3pipe.pipelines.view import Latest, NotATable, table_files
from af3pipe.schemas import DeadLetter, Reason
from af3pipe.transforms import metrics
from af3pipe.transforms.pubsub import is_subscription, reach, subscription_of
from af3pipe.transforms.stores import set_storage
from af3pipe.transforms.watch import check_watched
from af3pipe.transforms.write import new_run_id

_log = logging.getLogger(__name__)
_PRISM = (
    "cannot start Prism, Beam's runner for streams on one machine: {}. Where it cannot be downloaded, build it "
    "(`go install github.com/apache/beam/sdks/v2/go/cmd/prism@v" + beam.__version__ + "`) and put it on the path or "
    "give --prism_location"
)


class Watch:
    """A watching run that has begun.

    Args:
        job: What to do.
        beam_flags: Options for Beam, as on its command line. The default runner is Prism.

    Raises:
        JobError, ModelError: The job is wrong, found before anything was started.
        RunFailed: The runner does not take the job.
    """

    def __init__(self, job: JobConfig, beam_flags: Iterable[str] = ()) -> None:
        _check_keys(job)
        options = stream_options(job, list(beam_flags))
        set_storage(job.storage_options)
        self._checkpoint = batch.preflight(job, options, check_inputs=False)
        _check_inputs(job)
        self.run_id = new_run_id()
        self._job = job
        self._runner = options.view_as(StandardOptions).runner
        revision = self._checkpoint.revision if self._checkpoint and not self._checkpoint.path else job.revision
        try:
            pipeline = beam.Pipeline(options=options)
            graph.build_stream(pipeline, job.model_copy(update={"revision": revision}), self.run_id)
        except ValueError as error:  # Beam's own check of its options
            raise JobError(str(error)) from error
        batch.tell_unfinished(job)
        self._started, self._started_at = time.monotonic(), datetime.now(timezone.utc)
        self._before = metrics.tally()
        write_started(job, self.run_id)
        try:
            self._result = pipeline.run()
        except Exception as error:
            storage.delete(started_uri(job.output, self.run_id))
            text = batch.explain_failure(error)
            raise batch.RunFailed(_PRISM.format(text) if self._runner == "PrismRunner" else text) from error
        self._is_cancelled = False
        self._background = batch.Background(self._wait)

    def _wait(self) -> None:
        with batch.connected():
            self._result.wait_until_finish()

    def wait(self, seconds: float) -> bool:
        """Waits this long at most; says whether the run has ended."""
        return self._background.wait(seconds)

    def progress(self) -> batch.Progress:
        """How far it is, as far as this process can see."""
        return batch.progress(metrics.tally() - self._before, time.monotonic() - self._started)

    def stop(self) -> None:
        """Has it end when all that was found until now is written; it goes on until then."""
        storage.write_atomic(stop_uri(self._job.output, self.run_id), b"")

    def cancel(self) -> None:
        """Ends it now. What was not written yet is asked again by the next run into the same output."""
        self._is_cancelled = True
        self._result.cancel()

    def report(self) -> RunReport | None:
        """What it did, once it has ended; None where it was cancelled.

        Raises:
            RunFailed: The pipeline failed.
            StorageError, Rejected: Its books cannot be written or read back.
        """
        with batch.connected():
            state = self._result.state
        if self._is_cancelled or state == PipelineState.CANCELLED:
            storage.delete(stop_uri(self._job.output, self.run_id))
            return None
        self._background.result()
        if state not in (PipelineState.DONE, PipelineState.DRAINED):
            raise batch.RunFailed(f"the runner ended the job in state {state}; see its log above")
        job, wall_s = self._job, time.monotonic() - self._started
        counted = batch.counters(self._result)
        report = RunReport(
            self.run_id, count_run(job.output, self.run_id, None), wall_s, dict(sorted(counted.items()))
        )
        fill_empty_tables(job.output, job.tables(), self.run_id, job.partition_by)
        write_record(job, self._checkpoint, self._runner, self._started_at, report)
        storage.delete(stop_uri(job.output, self.run_id))
        _tell_left(job)
        return report


def _tell_left(job: JobConfig) -> None:
    """A stream does not know what it never found: a last look at its folders does."""
    folders = [name for name in job.inputs if not is_subscription(name)]
    if not folders:
        return
    try:
        found = relist(Latest(job.output, table_files(job.output)), folders, channel=job.channel, stream=job.stream)
    except (InputError, storage.StorageError, NotATable) as error:
        _log.warning("what is left to ask cannot be told: %s", error)
        return
    for number, example in (found.never, found.changed):
        if number:
            _log.warning(
                "%d files have no row as they are now, for example %s: they landed or changed after the last look, "
                "or were still being written. The next watch or run into the same output asks them",
                number,
                example,
            )


def stream_options(job: JobConfig, flags: list[str]) -> PipelineOptions:
    """Beam's options of a watching run.

    Raises:
        JobError: The runner does not stream.
    """
    options = beam_options(job, flags, default_runner="PrismRunner")
    standard, prism = options.view_as(StandardOptions), options.view_as(PrismRunnerOptions)
    if batch.is_in_process(options):
        raise JobError(
            f"runner {standard.runner} gives nothing before its input ends, and a watched one does not end; leave "
            "--runner away, which takes Prism, or name Flink or Dataflow"
        )
    standard.streaming = True
    flink = options.view_as(FlinkOptions)
    if standard.runner in ("FlinkRunner", "PortableRunner") and flink.shutdown_sources_after_idle_ms is None:
        # With checkpoints, Beam keeps what is read once (the output's earlier rows) open for ever, as Flink needed it
        # before 1.15; and the stream waits for its end.
        flink.shutdown_sources_after_idle_ms = 1
    if standard.runner == "PrismRunner" and not prism.prism_location:
        prism.prism_location = shutil.which("prism")
    return options


def _check_keys(job: JobConfig) -> None:
    """What only a run can do is told, and not left undone in silence."""
    for key, why in {
        "verify_sample": "a stream has no end at which to draw a sample",
        "chunk_recordings": "a stream writes as it goes",
    }.items():
        if key in job.model_fields_set:
            raise JobError(f"{key} is for `af3pipe run`: {why}")
    if any(map(is_subscription, job.inputs)) and not job.allow_prefixes:
        raise JobError(
            "messages may name nothing yet: give --allow-prefix (allow_prefixes in a job file), for example gs://archive"
        )


def _check_inputs(job: JobConfig) -> None:
    """What cannot be watched, or cannot be listed now, is told now; a folder that is not there yet may come."""
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
