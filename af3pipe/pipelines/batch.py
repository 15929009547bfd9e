"""The batch pipeline: recordings in, Parquet out, and the books of it."""

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
_CHUNK_ELSEWHERE = 100_000  # other runners keep on disk what they shuffle
_log = logging.getLogger(__name__)


class RunFailed(Exception):
    """The pipeline itself failed: what ended it, for the person who started it."""


class Progress(NamedTuple):
    """How far a run is, as far as this process can see."""

    found: int
    done: int
    dead_letters: int
    audio_s: float
    elapsed_s: float


def preflight(job: JobConfig, options: PipelineOptions, *, check_inputs: bool = True) -> Checkpoint | None:
    """What can be known to fail is found before a worker starts or a model is loaded.

    Returns:
        The checkpoint; None where it cannot be read here and the workers are elsewhere: they may well have it.

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
        _log.warning("the adapter cannot be read on this machine, only the workers can tell: %s", error)
    try:
        checkpoint = open_checkpoint(job.model, job.revision)
    except ModelError as error:
        if workers_are_here:
            raise
        _log.warning("the model cannot be read on this machine, only the workers can tell: %s", error)
        return None
    for task in job.all_tasks():
        resolve(task, checkpoint.family)  # raises where the family has no prompt for it, or nobody knows its parser
    return checkpoint


def _check_inputs(job: JobConfig) -> None:
    """Each input is looked at as far as its first recording.

    An audio file that is missing beside others is a dead letter of the run; a folder, glob or manifest that is
    missing or cannot be read would be any number of recordings, so the job does not start. An empty one is no error.
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
        ) as error:  # fsspec's: of a scheme that it does not know, or has no package for
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
    """Runs a job to its end and reads its books back.

    On Beam's in-process runner it runs in chunks, each of which lands before the next begins; on others as one
    pipeline.

    Args:
        job: What to do.
        beam_flags: Options for Beam, as on its command line.
        again: What there is to do instead of the job's inputs: recordings, which are not skipped where they ended as
            dead letters, and results that are to be written as they are.
        on_progress: Called now and then on the calling thread, with what this process has counted.
        progress_every_s: How often.

    Interrupted by Ctrl-C, it cancels its job at a Flink cluster; what was not written is asked by the next run.

    Raises:
        JobError, ModelError: Found before anything was started.
        RunFailed: The pipeline failed.
        StorageError, Rejected: The pipeline is done, but its books cannot be written or read back.
    """
    options = beam_options(job, list(beam_flags))
    runner = runner_of(options)
    set_storage(job.storage_options)
    checkpoint = preflight(job, options, check_inputs=again is None)
    run_id = new_run_id()
    # A branch may move while the run lasts: every worker takes the commit that was looked at here.
    pinned = {"revision": checkpoint.revision} if checkpoint and not checkpoint.path else {}
    if job.device == "auto" and runner.is_in_process:
        pinned["device"] = "all"  # no other worker will come for the other GPUs of this machine
    ran_job = job.model_copy(update=pinned)
    in_chunks = again is not None or runner.is_in_process
    runner.name_job(run_id)
    try:
        pipeline = new_pipeline(options)
        if not in_chunks:  # they have graphs of their own
            graph.build(pipeline, ran_job, run_id)
    except ValueError as error:  # Beam's own check of its options: a runner it does not know, a flag that is missing
        raise JobError(str(error)) from error
    tell_unfinished(job)
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
        runner.cancel_job()  # it would go on, and nobody wait for it
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


def tell_unfinished(job: JobConfig) -> None:
    """Warns of other runs into the output that have begun and not ended."""
    for other in unfinished_runs(job.output):
        _log.warning(
            "run %s, begun at %s on %s (process %s), has not finished. If it goes on, both may ask the same; if it "
            "was killed, %s.",
            *(other[name] for name in ("run_id", "started_at", "host", "pid")),
            "its answers are kept" if job.resume else "its answers are asked again",
        )


class _Ran(NamedTuple):
    """What a run found and counted, and the chunks that left a verified sample."""

    found: Found
    counters: Counter[str]
    chunks: tuple[int, ...]


def _run_whole(pipeline: beam.Pipeline, job: JobConfig, run_id: str) -> _Ran:
    """As one pipeline, on remote workers."""
    counters = _run_pipeline(pipeline)
    return _Ran(take_found(job.output, run_id), counters, (0,))


def _run_in_chunks(job: JobConfig, options: PipelineOptions, run_id: str, again: Items | None) -> _Ran:
    """Planned in this process first, then processed chunk by chunk, with one engine and one set of decoders."""
    is_here = runner_of(options).is_in_process
    how = graph.asking(job)
    counted: Counter[str] = Counter()
    chunks = []
    with Plan(job.partition_by) as plan, ExitStack() as held:
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
            _hold(how, held)
        done = 0
        for number, chunk in enumerate(plan.chunks(job.chunk_recordings if is_here else _CHUNK_ELSEWHERE)):
            before, done = done, done + sum(len(found.recordings) + len(found.dead_letters) for found in chunk)
            # Of the sample, each chunk has the share that it has of the recordings.
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


def _hold(how: graph.Asking, held: ExitStack) -> None:
    """Keeps what is costly to open from one chunk to the next.

    The engine from when there is something to request: what is opened again may have all its answers.
    """
    hold_engine(how.ask.asker.options)
    held.callback(release_engine, how.ask.asker.options)
    if how.decode.decoder.guard is not None:
        acquire_decoders(how.decode.decoder.guard)
        held.callback(release_decoders, how.decode.decoder.guard)


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
    """Raises RunFailed where the job server that is talked to is lost."""
    try:
        with _without_traceback_of_messages():
            yield
    except grpc.RpcError as error:  # a job that failed ends otherwise
        raise RunFailed(
            f"the connection to the job server was lost ({_rpc_fault(error)}). Where it is one of a cluster, the job "
            "may go on there all the same: look, for example at its web UI, and let it end or cancel it. Then run "
            "the same again, into the same output: only what has not been written is asked"
        ) from error


@contextmanager
def _without_traceback_of_messages() -> Iterator[None]:
    """Beam reads a job's messages on a thread of its own, which ends in a traceback when the connection is lost."""
    before = threading.excepthook

    def tell(ended: threading.ExceptHookArgs) -> None:
        if not isinstance(ended.exc_value, grpc.RpcError):
            before(ended)

    threading.excepthook = tell
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if thread.name == "wait_until_finish_read":
                thread.join(5)  # it loses the same connection
        threading.excepthook = before


def _rpc_fault(error: grpc.RpcError) -> str:
    """The status of a call, which most such errors are."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else type(error).__name__


class Background(Generic[T]):
    """Work on a thread of its own: Beam's in-process runner blocks until the job is done."""

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
        return self._ended.wait(seconds)  # a join that Ctrl-C interrupts takes the thread for ended

    def result(self) -> T:
        if isinstance(self._error, RunFailed):
            raise self._error
        if self._error is not None:
            raise RunFailed(explain_failure(self._error)) from self._error
        return self._result[0]


_FAULT = re.compile(
    r"(?:af3pipe\.[\w.]+\.)?(ModelError|EngineFailed|WorkerError|StorageError|CredentialsError): "
    r"(.+?)(?= \[while running|\n|$)"
)
# What it looks like where a worker cannot make anything of what it was sent, before it could compare versions.
_NOT_UNDERSTOOD = re.compile(
    r"ModuleNotFoundError: No module named .*"
    r"|ImportError: cannot import name .* from 'af3pipe.*"
    r"|AttributeError: Can't get attribute .*"
    r"|TypeError: code(?:\(\)| expected) .*"
    r"|SystemError: unknown opcode.*"
)


def explain_failure(error: BaseException) -> str:
    """The line that matters: runners wrap a worker's exception into a text of their whole traceback."""
    faults: list[tuple[str, str]] = _FAULT.findall(f"{type(error).__name__}: {error}")
    if faults:
        return faults[-1][1].strip()
    if not_understood := _NOT_UNDERSTOOD.search(str(error)):
        here = this_process()
        return (
            f"a worker cannot make anything of what it was sent ({not_understood[0]}); it must have what this "
            f"launcher has: af3pipe {here.af3pipe} with what that needs, Apache Beam {here.beam} and Python "
            f"{here.python}"
        )
    return storage.redact(f"{type(error).__name__}: {error}")


def progress(counted: Counter[str], elapsed_s: float) -> Progress:
    """How far a run is that has counted this."""
    return Progress(
        found=counted["recordings_found"],
        done=counted["recordings_done"],
        dead_letters=sum(n for name, n in counted.items() if name.startswith("dead_letters_")),
        audio_s=counted["audio_ms"] / 1000,
        elapsed_s=elapsed_s,
    )


def counters(result: Any) -> Counter[str]:
    """Beam's counters of this package, over all steps; a runner without metrics gives none."""
    total: Counter[str] = Counter()
    for counter in result.metrics().query()["counters"]:
        if counter.key.metric.namespace == metrics.NAMESPACE:
            committed = counter.committed  # some runners only tell what was attempted
            total[counter.key.metric.name] += (counter.attempted if committed is None else committed) or 0
    return total
