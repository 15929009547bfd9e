"""The batch pipeline: recordings in, Parquet out, and the books of it."""

import json
import logging
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from af3pipe import storage
from af3pipe.audio.guarded import DecoderLimits
from af3pipe.models.engine import ModelError
from af3pipe.models.family import Checkpoint, adapter_revision, model_revision, open_checkpoint
from af3pipe.models.tasks import DEFAULT_QUESTION_TOKENS, resolve, table_of
from af3pipe.pipelines.accounting import (
    RunCounts,
    count_run,
    fill_empty_tables,
    found_uri,
    read_verified,
    run_files,
    verified_uri,
    write_found,
    write_verified,
)
from af3pipe.pipelines.job import JobConfig, JobError, beam_options
from af3pipe.schemas import DeadLetter, Reason, Recording, Stage
from af3pipe.transforms import (
    AnswerRecordings,
    AskAudioFlamingo,
    DecodeAudio,
    Outcome,
    ReadRecordings,
    ReconcileRecordings,
    VerifyAnswers,
    WriteAnswers,
    WriteDeadLetters,
    WriteRecordings,
    metrics,
)
from af3pipe.transforms.ask import VerifiableOutcome
from af3pipe.transforms.read import list_recordings
from af3pipe.transforms.verify import Verified
from af3pipe.transforms.write import new_run_id

_log = logging.getLogger(__name__)
_IN_PROCESS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "SwitchingDirectRunner")
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


class RunFailed(Exception):
    """The pipeline itself failed: what ended it, for the person who started it."""


class Progress(NamedTuple):
    """How far a run is, as far as this process can see."""

    found: int
    done: int
    dead_letters: int
    audio_s: float
    elapsed_s: float


class RunReport(NamedTuple):
    """What a run did; `verified` is None where nothing was to be verified."""

    run_id: str
    counts: RunCounts
    wall_s: float
    metrics: dict[str, int]
    verified: Verified | None = None


def build(pipeline: beam.Pipeline, job: JobConfig, run_id: str) -> Outcome | VerifiableOutcome:
    """Lays the job's graph. Needs neither torch nor the model's weights.

    Returns:
        The outcome before it is written: answers, and all dead letters.
    """
    tasks = job.all_tasks()
    decode = DecodeAudio(
        model=job.model,
        revision=job.revision,
        over_length=job.over_length,
        split_at=job.split_at,
        split_tolerance_s=job.split_tolerance_s,
        on_silent=job.on_silent,
        silent_below_dbfs=job.silent_below,
        threads=job.decode_threads,
        guard=DecoderLimits(job.decode_timeout_s, job.decode_memory_mib) if job.decode_guard else None,
    )
    ask = AskAudioFlamingo(
        model=job.model,
        tasks=tasks,
        revision=job.revision,
        engine=job.engine,
        dtype=job.dtype,
        device=job.device,
        slots=job.slots,
        queue_audio_s=job.queue_audio_s,
        question_tokens=job.max_new_tokens or DEFAULT_QUESTION_TOKENS,
        question_think=job.think,
        attention=job.attention,
        cuda_graphs=job.cuda_graphs,
        adapter=job.adapter,
        quantize=job.quantize,
        verifiable=job.verify_sample > 0,
    )
    recordings = pipeline | "ReadRecordings" >> ReadRecordings(job.inputs, channel=job.channel, stream=job.stream)
    answers: Outcome | VerifiableOutcome = recordings | "AnswerRecordings" >> AnswerRecordings(
        decode, ask, accelerator=job.accelerator
    )
    results = {
        "recordings": recordings.good,
        "answers": answers.good,
        "dead_letters": answers.dead_letters,
    } | "ReconcileRecordings" >> ReconcileRecordings(tasks)
    _ = answers.good | "WriteAnswers" >> WriteAnswers(job.output, run_id=run_id, partition_by=job.partition_by)
    _ = answers.dead_letters | "WriteDeadLetters" >> WriteDeadLetters(
        job.output, run_id=run_id, partition_by=job.partition_by
    )
    _ = results | "WriteRecordings" >> WriteRecordings(job.output, run_id=run_id, partition_by=job.partition_by)
    _ = recordings | "CountFound" >> _CountFound(job.output, run_id)
    if job.verify_sample:
        verify = VerifyAnswers(decode, ask, sample=job.verify_sample, accelerator=job.accelerator)
        verified = answers | "VerifyAnswers" >> verify
        _ = verified | "WriteVerified" >> beam.Map(write_verified, output=job.output, run_id=run_id)
    return answers


class _CountFound(beam.PTransform):
    """Leaves the number of recordings found beside the run's tables; those rejected while listing count too."""

    def __init__(self, output: str, run_id: str) -> None:
        super().__init__()
        self._output = output
        self._run_id = run_id

    def expand(self, recordings: Any) -> Any:
        rejected = recordings.dead_letters | "ListedOnly" >> beam.Filter(lambda letter: letter.stage is Stage.LIST)
        ids = [
            recordings.good | "FoundId" >> beam.Map(lambda found: found.recording_id).with_output_types(str),
            rejected | "RejectedId" >> beam.Map(lambda letter: letter.recording_id).with_output_types(str),
        ]
        return (
            ids
            | "AllIds" >> beam.Flatten()
            | "DistinctIds" >> beam.Distinct()
            | "CountIds" >> beam.combiners.Count.Globally()
            | "WriteFound" >> beam.Map(write_found, output=self._output, run_id=self._run_id)
        )


def preflight(job: JobConfig, options: PipelineOptions) -> Checkpoint | None:
    """What can be known to fail is found before a worker starts or a model is loaded.

    Returns:
        The checkpoint; None where it cannot be read here and the workers are elsewhere: they may well have it.

    Raises:
        JobError: No input matches, one cannot be read, or the output cannot be written.
        ModelError: The checkpoint or the adapter cannot be found, the checkpoint is of a family that is not
            supported, or does not know a task.
    """
    _check_inputs(job.inputs)
    try:
        storage.check_writable(job.output)
    except storage.StorageError as error:
        raise JobError(f"output: {error}") from error
    workers_are_here = options.view_as(StandardOptions).runner in _IN_PROCESS
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


def _check_inputs(inputs: Sequence[str]) -> None:
    """Each input is looked at as far as its first recording.

    An audio file that is missing beside others is a dead letter of the run; a folder, glob or manifest that is
    missing or cannot be read would be any number of recordings, so the job does not start. An empty one is no error.
    """
    found: list[Recording | DeadLetter] = []
    for name in inputs:
        first = next(list_recordings(name), None)
        if isinstance(first, DeadLetter) and first.uri == name:  # the input itself, not a row of it
            is_audio_file = storage.name(name).rpartition(".")[2].lower() in storage.AUDIO_EXTENSIONS
            if first.reason is not Reason.NOT_FOUND or (not is_audio_file and len(inputs) > 1):
                raise JobError(f"input {name}: {first.detail}")
        elif first is not None:
            found.append(first)
        else:
            _log.warning("input %s matches nothing", name)
    if not found:
        raise JobError(
            f"no input matched: {', '.join(inputs)}. Check the spelling; quote globs, so that the shell "
            "leaves them alone; a folder is searched for audio files only"
        )


def run(
    job: JobConfig,
    beam_flags: Iterable[str] = (),
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    progress_every_s: float = 0.5,
) -> RunReport:
    """Runs a job to its end and reads its books back.

    Args:
        job: What to do.
        beam_flags: Options for Beam, as on its command line.
        on_progress: Called now and then on the calling thread, with what this process has counted.
        progress_every_s: How often.

    Raises:
        JobError, ModelError: Found before anything was started.
        RunFailed: The pipeline failed.
        StorageError, Rejected: The pipeline is done, but its books cannot be written or read back.
    """
    options = beam_options(job, list(beam_flags))
    checkpoint = preflight(job, options)
    run_id = new_run_id()
    try:
        pipeline = beam.Pipeline(options=options)
        # A branch may move while the run lasts: every worker takes the commit that was looked at here.
        pinned = {"revision": checkpoint.revision} if checkpoint and not checkpoint.path else {}
        if job.device == "auto" and is_in_process(options):
            pinned["device"] = "all"  # no other worker will come for the other GPUs of this machine
        build(pipeline, job.model_copy(update=pinned), run_id)
    except ValueError as error:  # Beam's own check of its options: a runner it does not know, a flag that is missing
        raise JobError(str(error)) from error
    started = time.monotonic()
    before = metrics.tally()
    background = _Background(pipeline)
    while not background.wait(progress_every_s):
        on_progress(_progress(metrics.tally() - before, time.monotonic() - started))
    result = background.result()
    wall_s = time.monotonic() - started
    on_progress(_progress(metrics.tally() - before, wall_s))
    verified = read_verified(job.output, run_id) if job.verify_sample else None
    report = RunReport(run_id, count_run(job.output, run_id), wall_s, _counters(result), verified)
    tables = {"recordings", "dead_letters", *(table_of(task.name) for task in job.all_tasks())}
    fill_empty_tables(job.output, sorted(tables), run_id, job.partition_by)
    _write_record(job, checkpoint, options, report)
    return report


class _Background:
    """A pipeline run on a thread of its own: Beam's in-process runner blocks until the job is done."""

    def __init__(self, pipeline: beam.Pipeline) -> None:
        self._pipeline = pipeline
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="af3pipe-run", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._pipeline.run()
            self._result.wait_until_finish()
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            self._error = error

    def wait(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> Any:
        if self._error is not None:
            raise RunFailed(explain_failure(self._error)) from self._error
        state = str(self._result.state)
        if state != "DONE":
            raise RunFailed(f"the runner ended the job in state {state}; see its log above")
        return self._result


_FAULT = re.compile(r"(?:af3pipe\.[\w.]+\.)?(ModelError|EngineFailed|StorageError): (.+?)(?= \[while running|\n|$)")


def explain_failure(error: BaseException) -> str:
    """The line that matters: runners wrap a worker's exception into a text of their whole traceback."""
    faults: list[tuple[str, str]] = _FAULT.findall(f"{type(error).__name__}: {error}")
    if faults:
        return faults[-1][1].strip()
    return f"{type(error).__name__}: {error}"


def _progress(counted: Counter[str], elapsed_s: float) -> Progress:
    return Progress(
        found=counted["recordings_found"],
        done=counted["recordings_done"],
        dead_letters=sum(n for name, n in counted.items() if name.startswith("dead_letters_")),
        audio_s=counted["audio_ms"] / 1000,
        elapsed_s=elapsed_s,
    )


def _counters(result: Any) -> dict[str, int]:
    """Beam's counters of this package, over all steps; a runner without metrics gives none."""
    total: Counter[str] = Counter()
    for counter in result.metrics().query()["counters"]:
        if counter.key.metric.namespace == metrics.NAMESPACE:
            committed = counter.committed  # some runners only tell what was attempted
            total[counter.key.metric.name] += (counter.attempted if committed is None else committed) or 0
    return dict(sorted(total.items()))


def _write_record(job: JobConfig, checkpoint: Checkpoint | None, options: PipelineOptions, report: RunReport) -> None:
    """The run's own record, written last: who finds it knows that the run is complete."""
    counts = report.counts
    record = {
        "run_id": report.run_id,
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "wall_s": round(report.wall_s, 3),
        "job": _without_secrets(job.model_dump(mode="json")),
        "runner": options.view_as(StandardOptions).runner,
        "model": _model_record(job, checkpoint),
        "versions": _versions(),
        "recordings_found": counts.found,
        "recordings": counts.states,
        "answers": counts.answers,
        "dead_letters": counts.dead_letters,
        "audio_s": round(counts.audio_s, 3),
        "reconciled": counts.reconciled,
        "problems": list(counts.problems),
        "verified": report.verified.to_dict() if report.verified else None,
        "counters": report.metrics,
        "files": run_files(job.output, report.run_id),
    }
    uri = storage.join(job.output, "_runs", f"{report.run_id}.json")
    storage.write_atomic(uri, json.dumps(record, indent=1, ensure_ascii=False).encode())
    storage.delete(found_uri(job.output, report.run_id))
    if report.verified:
        storage.delete(verified_uri(job.output, report.run_id))


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


_SECRET_NAME = re.compile(r"secret|token|password|credential|connection_string|access_key|api_key", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@|(?<=[?&])(?:[\w-]*(?:sig|token|key)[\w-]*)=[^&\s]+", re.IGNORECASE)


def _without_secrets(value: Any, name: str = "") -> Any:
    """The job as it is recorded: what is named like a secret, or stands in a URL like one, is not."""
    if isinstance(value, dict):
        return {key: _without_secrets(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item, name) for item in value]
    if isinstance(value, str):
        is_secret = _SECRET_NAME.search(name)
        return "***" if is_secret else _USER_IN_URL.sub("***", value)
    return value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "af3pipe": version("af3pipe")}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a launcher needs no torch
            found[name] = "not installed"
    return found


def is_in_process(options: PipelineOptions) -> bool:
    """Whether the run counts in this process, so that its progress can be shown live."""
    return (
        options.view_as(StandardOptions).runner in _IN_PROCESS
        and options.get_all_options().get("direct_running_mode") != "multi_processing"
    )
