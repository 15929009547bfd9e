"""Runs a batch job: reads recordings, writes Parquet tables, and reconciles the counts."""

import itertools
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from af3pipe import storage
from af3pipe.audio.guard import acquire_decoders, release_decoders
from af3pipe.models.engine import ModelError, hold_engine, release_engine
from af3pipe.models.family import Checkpoint, adapter_revision, open_checkpoint
from af3pipe.models.tasks import resolve
from af3pipe.pipelines import graph
from af3pipe.pipelines.beam_flags import beam_options
from af3pipe.pipelines.handover import Found, take_found, take_verified, verified_uri
from af3pipe.pipelines.job import JobConfig, JobError
from af3pipe.pipelines.plan import Plan
from af3pipe.pipelines.report import RunReport, write_record, write_started
from af3pipe.runners.check import check_runner, runner_of
from af3pipe.runners.pipeline import new_pipeline
from af3pipe.runners.runner import RunnerError
from af3pipe.schemas import DeadLetter, Reason, Recording, RecordingResult
from af3pipe.tables.layout import new_run_id
from af3pipe.tables.reconcile import count_run
from af3pipe.tables.run_record import unfinished_runs
from af3pipe.tables.write import fill_empty_tables, write_results
from af3pipe.transforms import metrics
from af3pipe.transforms.inputs.pubsub import is_subscription
from af3pipe.transforms.launcher import this_process
from af3pipe.transforms.plan import WorkKeys
from af3pipe.transforms.stores import set_storage

T = TypeVar("T")
Items: TypeAlias = Iterable[Recording | DeadLetter | RecordingResult]
ROWS_PER_WRITE = 10_000
_REMOTE_CHUNK = 100_000  # other runners shuffle on disk
_log = logging.getLogger(__name__)


class RunFailed(Exception):
    """The pipeline failed as a whole; the message says why, for the user."""


class Progress(NamedTuple):
    """Reports the progress of a run, as far as this process can see it."""

    found: int
    done: int
    dead_letters: int
    audio_s: float
    elapsed_s: float


def preflight(job: JobConfig, options: PipelineOptions, *, check_inputs: bool = True) -> Checkpoint | None:
    """Checks the runner, inputs, output and model, so that a job fails before a worker starts or a model is loaded.

    Returns:
        The checkpoint; None if it cannot be read here and the workers are remote, since they may have it.

    Raises:
        JobError: The runner cannot be reached, no input matches, one cannot be read, or the output cannot be written.
        ModelError: The checkpoint or the adapter cannot be found, the checkpoint is of a family that is not
            supported, or does not know a task.
    """
    try:
        check_runner(options)
        if check_inputs:
            _check_inputs(job)
    except RunnerError as error:
        raise JobError(str(error)) from error
    except storage.StorageError as error:
        raise JobError(f"input: {error}") from error
    try:
        storage.check_writable(job.output)
    except storage.StorageError as error:
        raise JobError(f"output: {error}") from error
    workers_are_here = runner_of(options).workers_are_here
    try:
        if job.adapter is not None:
            adapter_revision(job.adapter)
    except ModelError as error:
        if workers_are_here:
            raise
        _log.warning("the adapter cannot be read on this machine, so only the workers can check it: %s", error)
    try:
        checkpoint = open_checkpoint(job.model, job.revision)
    except ModelError as error:
        if workers_are_here:
            raise
        _log.warning("the model cannot be read on this machine, so only the workers can check it: %s", error)
        return None
    for task in job.all_tasks():
        resolve(task, checkpoint.family)  # raises where the family has no prompt for it, or nobody knows its parser
    return checkpoint


def _check_inputs(job: JobConfig) -> None:
    """Lists each input up to its first recording, and raises JobError if an input cannot be read.

    A missing audio file, if it is not the only input, becomes a dead letter of the run. A missing or unreadable
    folder, glob or manifest may stand for any number of recordings, so the job does not start. An empty one is no
    error.
    """
    found: list[Recording | DeadLetter] = []
    for name in job.inputs:
        if is_subscription(name):
            raise JobError(f"input {name} is a subscription, whose messages never end: `af3pipe watch` reads it")
        try:
            first = next(graph.found_by(job, name), None)
        except (
            ValueError,
            ImportError,
        ) as error:  # fsspec's: an unknown scheme, or one whose package is missing
            raise JobError(f"input {name}: {error}") from error
        if isinstance(first, DeadLetter) and first.uri == name:  # the input itself, not a row of it
            is_audio_file = storage.name(name).rpartition(".")[2].lower() in storage.AUDIO_EXTENSIONS
            if first.reason is not Reason.NOT_FOUND or (not is_audio_file and len(job.inputs) > 1):
                raise JobError(f"input {name}: {first.detail}")
        elif first is not None:
            found.append(first)
        else:
            _log.warning("input %s matches nothing", name)
    if not found:
        raise JobError(
            f"no input matched: {', '.join(job.inputs)}. Check the spelling; quote globs, so that the shell "
            "leaves them alone; a folder is searched for audio files only"
        )


def run(
    job: JobConfig,
    beam_flags: Iterable[str] = (),
    *,
    again: Items | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    progress_every_s: float = 0.5,
) -> RunReport:
    """Runs a job to its end, reconciles the rows that it wrote, and writes its run record.

    On Beam's in-process runner the job runs in chunks, each of which is written before the next begins; on other
    runners it is one pipeline. Ctrl-C cancels the job on a Flink cluster; the next run processes what was not
    written.

    Args:
        job: The job.
        beam_flags: Options for Beam, as on its command line.
        again: Items to process instead of the job's inputs: recordings, which are not skipped if they have dead
            letters, and results, which are written verbatim.
        on_progress: Called repeatedly on the calling thread with the counts of this process.
        progress_every_s: Seconds between these calls.

    Raises:
        JobError, ModelError: A check failed before anything was started.
        RunFailed: The pipeline failed.
        StorageError, Rejected: The pipeline is done, but its rows cannot be counted or its record not written.
    """
    options = beam_options(job, list(beam_flags))
    runner = runner_of(options)
    set_storage(job.storage_options)
    checkpoint = preflight(job, options, check_inputs=again is None)
    run_id = new_run_id()
    # A branch may move while the run lasts: every worker uses the commit that was checked here.
    pinned = {"revision": checkpoint.revision} if checkpoint and not checkpoint.path else {}
    if job.device == "auto" and runner.is_in_process:
        pinned["device"] = "all"  # no other worker will come for the other GPUs of this machine
    ran_job = job.model_copy(update=pinned)
    in_chunks = again is not None or runner.is_in_process
    runner.name_job(run_id)
    try:
        pipeline = new_pipeline(options)
        if not in_chunks:  # each chunk has its own graph
            graph.build(pipeline, ran_job, run_id)
    except ValueError as error:  # Beam's own check of its options: a runner it does not know, a flag that is missing
        raise JobError(str(error)) from error
    warn_unfinished(job)
    started, started_at = time.monotonic(), datetime.now(timezone.utc)
    write_started(job, run_id)
    before = metrics.tally()
    try:
        background = Background(
            lambda: (
                _run_in_chunks(ran_job, options, run_id, again)
                if in_chunks
                else _run_whole(pipeline, ran_job, run_id)
            )
        )
        while not background.wait(progress_every_s):
            on_progress(progress(metrics.tally() - before, time.monotonic() - started))
    except KeyboardInterrupt:
        runner.cancel_job()  # else it would continue without anyone waiting for it
        raise
    found, counted, chunks = background.result()
    wall_s = time.monotonic() - started
    on_progress(progress(metrics.tally() - before, wall_s))
    sampled = [verified_uri(job.output, run_id, chunk) for chunk in chunks]
    verified = take_verified(sampled) if job.verify_sample else None
    report = RunReport(run_id, count_run(job.output, run_id, *found), wall_s, dict(sorted(counted.items())), verified)
    fill_empty_tables(job.output, job.tables(), run_id, job.partition_by)
    write_record(job, checkpoint, options.view_as(StandardOptions).runner, started_at, report)
    return report


def warn_unfinished(job: JobConfig) -> None:
    """Warns of other unfinished runs into the same output."""
    for other in unfinished_runs(job.output):
        _log.warning(
            "run %s, started at %s on %s (process %s), has not finished. If it is still running, both may process "
            "the same recordings; if it was killed, %s.",
            *(other[name] for name in ("run_id", "started_at", "host", "pid")),
            "its answers are reused" if job.resume else "its recordings are processed again",
        )


class _Ran(NamedTuple):
    """Has what a run found and counted, and the numbers of the chunks that wrote a verified sample."""

    found: Found
    counters: Counter[str]
    chunks: tuple[int, ...]


def _run_whole(pipeline: beam.Pipeline, job: JobConfig, run_id: str) -> _Ran:
    """Runs the job as one pipeline on remote workers."""
    counters = _run_pipeline(pipeline)
    return _Ran(take_found(job.output, run_id), counters, (0,))


def _run_in_chunks(job: JobConfig, options: PipelineOptions, run_id: str, again: Items | None) -> _Ran:
    """Plans the job in this process, then runs it chunk by chunk with the same engine and decoder processes."""
    is_here = runner_of(options).is_in_process
    how = graph.asking(job)
    counted: Counter[str] = Counter()
    chunks = []
    with Plan(job.partition_by) as plan, ExitStack() as resources:
        if again is not None:
            plan.add_found(again)
        for name in dict.fromkeys(job.inputs if again is None else ()):
            plan.add_found(graph.found_by(job, name))
        if job.resume:
            plan.add_existing(job.output)
        how.ask.asker.setup()
        ready = plan.make(WorkKeys(how.decode.decoder, how.ask.asker), retry=again is not None)
        while batch := list(itertools.islice(ready, ROWS_PER_WRITE)):
            counted["files_written"] += len(list(write_results(batch, job.output, run_id, job.partition_by)))
        counted["recordings_found"] = plan.found
        counted["recordings_skipped_done"] = plan.skipped
        metrics.count("recordings_found", plan.found)
        metrics.count("recordings_done", plan.found - plan.to_do)
        if plan.to_do and is_here:
            _keep_open(how, resources)
        done = 0
        for number, chunk in enumerate(plan.chunks(job.chunk_recordings if is_here else _REMOTE_CHUNK)):
            before, done = done, done + sum(len(found.recordings) + len(found.dead_letters) for found in chunk)
            # Each chunk's share of the sample is its share of the recordings.
            total = max(plan.to_do, done)
            sample = job.verify_sample * done // total - job.verify_sample * before // total
            pipeline = new_pipeline(options)
            sampled = job.model_copy(update={"verify_sample": sample})
            graph.build_chunk(pipeline, sampled, run_id, chunk, number, here=is_here)
            counted += _run_pipeline(pipeline)
            if sample:
                chunks.append(number)
        counted["storage_retries"] += storage.take_retries()
        return _Ran(Found(plan.found, plan.skipped, plan.kept_dead_letters), counted, tuple(chunks))


def _keep_open(how: graph.Asking, resources: ExitStack) -> None:
    """Keeps the engine and the decoder processes open from one chunk to the next, as opening them is slow."""
    hold_engine(how.ask.asker.options)
    resources.callback(release_engine, how.ask.asker.options)
    if how.decode.decoder.guard is not None:
        acquire_decoders(how.decode.decoder.guard)
        resources.callback(release_decoders, how.decode.decoder.guard)


def _run_pipeline(pipeline: beam.Pipeline) -> Counter[str]:
    result = pipeline.run()
    with connected():
        result.wait_until_finish()
        state = str(result.state)
        if state != "DONE":
            raise RunFailed(f"the runner ended the job in state {state}; see its log above")
        return counters(result)


@contextmanager
def connected() -> Iterator[None]:
    """Raises RunFailed if the connection to the job server is lost."""
    try:
        with _without_traceback_of_messages():
            yield
    except grpc.RpcError as error:  # a failed job raises something else
        raise RunFailed(
            f"the connection to the job server was lost ({_rpc_fault(error)}). If it belongs to a cluster, the job "
            "may still be running there: check, for example in the cluster's web UI, and wait for it or cancel it. "
            "Then run the job again into the same output: only recordings that have not been written are processed"
        ) from error


@contextmanager
def _without_traceback_of_messages() -> Iterator[None]:
    """Suppresses the traceback that Beam's message-reading thread prints when the connection is lost."""
    before = threading.excepthook

    def report(ended: threading.ExceptHookArgs) -> None:
        if not isinstance(ended.exc_value, grpc.RpcError):
            before(ended)

    threading.excepthook = report
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if thread.name == "wait_until_finish_read":
                thread.join(5)  # it loses the same connection
        threading.excepthook = before


def _rpc_fault(error: grpc.RpcError) -> str:
    """Returns the status and details of a failed call, or else the class of the error."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else type(error).__name__


class Background(Generic[T]):
    """Runs work on a background thread, since Beam's in-process runner blocks until the job is done."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="af3pipe-run", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            self._error = error
        finally:
            self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Waits up to this long; returns whether the work has ended."""
        return self._ended.wait(seconds)  # Thread.join, interrupted by Ctrl-C, takes the thread as ended

    def result(self) -> T:
        """Returns the result of the ended work. Raises RunFailed if it failed."""
        if isinstance(self._error, RunFailed):
            raise self._error
        if self._error is not None:
            raise RunFailed(explain_failure(self._error)) from self._error
        return self._result[0]


_FAULT = re.compile(
    r"(?:af3pipe\.[\w.]+\.)?(ModelError|EngineFailed|WorkerError|StorageError|CredentialsError): "
    r"(.+?)(?= \[while running|\n|$)"
)
# Errors of a worker that cannot unpickle the graph, before it could compare versions.
_UNPICKLING_FAULT = re.compile(
    r"ModuleNotFoundError: No module named .*"
    r"|ImportError: cannot import name .* from 'af3pipe.*"
    r"|AttributeError: Can't get attribute .*"
    r"|TypeError: code(?:\(\)| expected) .*"
    r"|SystemError: unknown opcode.*"
)


def explain_failure(error: BaseException) -> str:
    """Extracts the cause of a failure, since runners wrap a worker's exception in the text of a whole traceback."""
    faults: list[tuple[str, str]] = _FAULT.findall(f"{type(error).__name__}: {error}")
    if faults:
        return faults[-1][1].strip()
    if fault := _UNPICKLING_FAULT.search(str(error)):
        here = this_process()
        return (
            f"a worker cannot unpickle the job that it was sent ({fault[0]}); it needs the versions of this "
            f"launcher: af3pipe {here.af3pipe} with its dependencies, Apache Beam {here.beam} and Python "
            f"{here.python}"
        )
    return storage.redact(f"{type(error).__name__}: {error}")


def progress(counted: Counter[str], elapsed_s: float) -> Progress:
    """Returns the progress of a run from its counters."""
    return Progress(
        found=counted["recordings_found"],
        done=counted["recordings_done"],
        dead_letters=sum(n for name, n in counted.items() if name.startswith("dead_letters_")),
        audio_s=counted["audio_ms"] / 1000,
        elapsed_s=elapsed_s,
    )


def counters(result: Any) -> Counter[str]:
    """Returns the sums of this package's Beam counters over all steps; empty if the runner has no metrics."""
    total: Counter[str] = Counter()
    for counter in result.metrics().query()["counters"]:
        if counter.key.metric.namespace == metrics.NAMESPACE:
            committed = counter.committed  # some runners only report attempted counts
            total[counter.key.metric.name] += (counter.attempted if committed is None else committed) or 0
    return total
