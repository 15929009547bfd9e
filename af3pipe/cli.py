"""The command line: `af3pipe demo`, `run`, `watch` and `redrive`; the rest is in `cli_output`."""

import functools
import inspect
import json
import logging
import signal
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import SpinnerColumn, TextColumn
from rich.table import Table

from af3pipe import __version__, cli_output, storage
from af3pipe.cli_output import stop
from af3pipe.models.engine import ModelError
from af3pipe.models.family import DEFAULT_MODEL
from af3pipe.models.tasks import ANSWER_TABLES
from af3pipe.pipelines import batch, streaming
from af3pipe.pipelines import redrive as redriving
from af3pipe.pipelines.accounting import read_rows, run_files
from af3pipe.pipelines.job import (
    JobConfig,
    JobError,
    beam_options,
    load_job_values,
    make_job,
    split_beam_flags,
)
from af3pipe.pipelines.record import RunReport
from af3pipe.pipelines.redrive import Chosen
from af3pipe.pipelines.submit import finish as finishing
from af3pipe.pipelines.view import NotATable
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.transforms.stores import set_storage
from af3pipe.transforms.verify import Verified

EXIT_FAILED = 1
EXIT_WRONG_JOB = 2
EXIT_DEAD_LETTERS = 3
_SAME_SIGNAL_S = 1.0  # a terminal and a program that waits for this one may both pass one on

app = typer.Typer(
    name="af3pipe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Caption, transcribe and query audio archives with Audio Flamingo 3 and Music Flamingo.",
)
_out = Console()
_err = Console(stderr=True)
_log = logging.getLogger("af3pipe")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"af3pipe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder for the Parquet.")] = "af3pipe-demo",
) -> None:
    """Run the whole pipeline on sample recordings with a tiny trained model; both ship with the package.

    One sample is broken and one is longer than the model takes: they show what a dead letter is. The model knows
    forty-odd words and ten sounds, and when told to transcribe what is no speech, it makes words up.
    """
    with _demo_inputs() as inputs:
        values = {
            "inputs": inputs,
            "output": output,
            "model": "demo",
            "tasks": ["caption", "transcript"],
            "questions": ["Is there speech in the audio? Answer yes or no."],
            "max_new_tokens": 24,
            "resume": False,  # it shows all of it, however often it is run
        }
        job = _checked(lambda: make_job(values))
        report = _run(job, [])
    _show_answers(job, report)
    _out.print("The tiny model makes words up when told to transcribe what is no speech.\n", style="dim")
    _show_dead_letters(job, report)
    _show_counts(job, report)
    _exit(job, report)


@contextmanager
def _demo_inputs() -> Iterator[list[str]]:
    """The clips in the package, and a recording longer than the model takes: 601 s of silence, made here."""
    with (
        resources.as_file(resources.files("af3pipe.demo") / "clips") as clips,
        tempfile.TemporaryDirectory(prefix="af3pipe-demo-") as folder,
    ):
        with wave.open(str(Path(folder) / "over_length.wav"), "wb") as file:
            file.setparams((1, 1, 8_000, 0, "NONE", "not compressed"))
            file.writeframes(b"\x80" * 601 * 8_000)  # 8-bit WAV is unsigned: 128 is silence
        yield [str(clips), folder]


def _job_flags(
    output: Annotated[str | None, typer.Option(help="Folder or URL for the Parquet.")] = None,
    partition_by: Annotated[
        list[str] | None,
        typer.Option(help="Hive folders below each table: date, run, or a metadata column; may be given again."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Hub id, local directory, or `demo`; the default is {DEFAULT_MODEL}. NVIDIA's released weights "
            "are for **non-commercial** use; an adapter made from them inherits that."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder of a PEFT LoRA to merge, such as the released model's `think`.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or fp8: the language model's weights in fewer bits.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Ask the model to reason first; needs the adapter trained to."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="caption or transcript; more than one may be given.")] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Asked of every recording; choices follow: `Who? | cat | dog`.")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="File of questions: a line each, or .jsonl with question, choices, id.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A task of your own: `mood=What mood is this music in?`")
    ] = None,
    over_length: Annotated[
        str | None,
        typer.Option(help="Longer than the model takes: dead-letter (default), truncate or split."),
    ] = None,
    split_at: Annotated[
        str | None,
        typer.Option(help="Where split cuts: at the cap (default), or at the quietest point before it: silence."),
    ] = None,
    split_tolerance_s: Annotated[
        float | None, typer.Option(help="How many seconds before the cap that point may be; 15 by default.")
    ] = None,
    on_silent: Annotated[
        str | None, typer.Option(help="Silent audio: flag it and ask (default), or dead-letter it unasked.")
    ] = None,
    silent_below: Annotated[
        float | None, typer.Option(help="Silent is what peaks at or below this, in dBFS; -60 by default.")
    ] = None,
    channel: Annotated[
        str | None, typer.Option(help="What is heard: mix (default), left, right, or a channel's number from 0.")
    ] = None,
    stream: Annotated[
        str | None, typer.Option(help="Which audio stream of a video, from 0; the default is its main one.")
    ] = None,
    allow_prefix: Annotated[
        list[str] | None,
        typer.Option(
            help="URL below which a manifest from elsewhere may name audio, beside its own bucket or folder."
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest reply, for every task.")] = None,
    engine: Annotated[str | None, typer.Option(help="What runs the model: transformers.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, all, or cuda:0,cuda:1.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Of the audio encoder: sdpa, eager, flash_attention_2.")
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option("--cuda-graphs/--no-cuda-graphs", help="Capture decoding steps as CUDA graphs (default)."),
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Most prompts decoded together.")] = None,
    queue_audio_s: Annotated[float | None, typer.Option(help="Most seconds of audio that wait.")] = None,
    decode_threads: Annotated[int | None, typer.Option(help="Recordings decoded at once.")] = None,
    decode_guard: Annotated[
        bool | None,
        typer.Option(
            "--decode-guard/--no-decode-guard",
            help="Decode in processes of their own (default), where a crash costs one recording, or in the worker's.",
        ),
    ] = None,
    decode_timeout_s: Annotated[
        float | None, typer.Option(help="Longest that a decoder may take for 10 s of audio; 60 by default.")
    ] = None,
    decode_memory_mib: Annotated[
        int | None, typer.Option(help="Most memory that a decoder may take; 1024 by default.")
    ] = None,
    accelerator: Annotated[str | None, typer.Option(help="Beam's accelerator hint for GPU workers.")] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Ask only what earlier runs into the same output have not answered (default), or everything anew.",
        ),
    ] = None,
    chunk_recordings: Annotated[
        int | None,
        typer.Option(help="Recordings that a worker asks before their rows land; 1000 by default."),
    ] = None,
    fail_on_dead_letters: Annotated[
        str | None, typer.Option(help="Fail when there are more than this: a count, or a share such as 5%.")
    ] = None,
    verify_sample: Annotated[
        int | None,
        typer.Option(
            help="Ask so many requests, drawn at random, again by plain generate, one at a time: in float32 the run "
            "fails where a reply differs, else it is told how many agree."
        ),
    ] = None,
) -> dict[str, Any]:
    """What a job's flags say, by key of the job."""
    flags = {
        "output": output,
        "partition_by": partition_by,
        "model": model,
        "revision": revision,
        "adapter": adapter,
        "quantize": quantize,
        "think": think,
        "tasks": [*(task or []), *map(_own_task, prompt or [])] or None,
        "questions": [*map(_question, question or []), *(_question_file(questions) if questions else [])] or None,
        "over_length": over_length,
        "split_at": split_at,
        "split_tolerance_s": split_tolerance_s,
        "on_silent": on_silent,
        "silent_below": silent_below,
        "channel": channel,
        "stream": stream,
        "allow_prefixes": allow_prefix,
        "max_new_tokens": max_new_tokens,
        "engine": engine,
        "dtype": dtype,
        "device": device,
        "attention": attention,
        "cuda_graphs": cuda_graphs,
        "slots": slots,
        "queue_audio_s": queue_audio_s,
        "decode_threads": decode_threads,
        "decode_guard": decode_guard,
        "decode_timeout_s": decode_timeout_s,
        "decode_memory_mib": decode_memory_mib,
        "accelerator": accelerator,
        "resume": resume,
        "chunk_recordings": chunk_recordings,
        "fail_on_dead_letters": fail_on_dead_letters,
        "verify_sample": verify_sample,
    }
    return {key: value for key, value in flags.items() if value is not None}


def _takes_job_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of a job beside its own; it gets them as `flags`, as `_job_flags` gives them."""
    own = [found for found in inspect.signature(command).parameters.values() if found.name != "flags"]
    shared = list(inspect.signature(_job_flags).parameters.values())

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        command(**{found.name: values.pop(found.name) for found in own}, flags=_job_flags(**values))

    vars(with_flags)["__signature__"] = inspect.Signature([*own, *shared])
    with_flags.__annotations__ = {found.name: found.annotation for found in (*own, *shared)}
    return with_flags


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Options that are not listed here go to Beam, for example `--runner flink --flink-master HOST:8081`. "
    "Exit codes: 0 done; 1 the run failed, its counts do not reconcile or its replies do not verify; 2 the job is "
    "wrong; 3 more dead letters than allowed.",
)
@_takes_job_flags
def run(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders, globs, manifests (.jsonl, .csv, .tsv, .parquet), tar shards or Hugging Face data "
            "sets, local or on any fsspec URL; or one job file (.yaml).",
            show_default=False,
        ),
    ] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Ask a model about recordings and write the answers as Parquet.

    Give inputs and options, or a job file with the same words as keys; options win over the file.
    """
    job, beam_flags = _checked(lambda: _job(inputs or [], flags))
    report = _run(job, beam_flags)
    _show_counts(job, report)
    _exit(job, report)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Options that are not listed here go to Beam; the runner is Prism unless `--runner` names Flink or "
    "Dataflow. Exit codes are those of `run`.",
)
@_takes_job_flags
def watch(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Folders, globs or files, local or on any fsspec URL; Pub/Sub subscriptions "
            "(pubsub://projects/PROJECT/subscriptions/NAME); or one job file (.yaml).",
            show_default=False,
        ),
    ] = None,
    every: Annotated[str | None, typer.Option(help="How often to look: 30s by default.")] = None,
    window: Annotated[
        str | None, typer.Option(help="Windows of the files' modification time that rows land in: 5m by default.")
    ] = None,
    pane_every: Annotated[
        str | None, typer.Option(help="How long rows wait for others to land with: 60s by default.")
    ] = None,
    stop_after: Annotated[str | None, typer.Option(help="When to stop; the default is when it is told to.")] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Watch folders or messages, and ask a model about what lands or changes, until told to stop.

    Ctrl-C (or SIGTERM) has it write what it has found, and end; a second one ends it at once. What is not written
    then is asked by the next run or watch into the same output. What that has answered already is not asked again.
    """
    own = {"every": every, "window": window, "pane_every": pane_every, "stop_after": stop_after}
    given = {key: value for key, value in own.items() if value is not None}
    job, beam_flags = _checked(lambda: _job(inputs or [], flags | ({"watch": given} if given else {})))
    report = _watch(job, beam_flags)
    if report is None:
        stop("cancelled; what was not written is asked by the next run or watch into the same output", EXIT_FAILED)
    _show_counts(job, report)
    _exit(job, report)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Options that are not listed here go to Beam. Exit codes are those of `run`.",
)
def redrive(
    context: typer.Context,
    output: Annotated[str, typer.Argument(metavar="OUT", help="What --output was.", show_default=False)],
    reason: Annotated[
        list[str] | None, typer.Option(help="Only dead letters of this reason; may be repeated.")
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only those of this stage; may be repeated.")] = None,
    retryable: Annotated[
        bool | None,
        typer.Option(
            "--retryable/--not-retryable", help="Only those that may succeed by themselves, or only others."
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of the job: `over_length=split`; the value is read as YAML."),
    ] = None,
    job_file: Annotated[
        str | None,
        typer.Option("--job", help="Job file whose keys hold instead, for example for secrets in storage_options."),
    ] = None,
) -> None:
    """Run the dead letters of OUT again, from their own rows, into the same OUT.

    Each is asked what its own run was asked, and only what has no answer yet. What succeeds is no dead letter any
    more in what `export` and the views of docs/output.md show; all earlier rows stay.
    """
    _known("--reason", reason or [], Reason)
    _known("--stage", stage or [], Stage)
    others, beam_flags = _checked(lambda: split_beam_flags(context.args))
    if others:
        stop(f"redrive takes one OUT; what is {' '.join(others)}?", EXIT_WRONG_JOB)
    changes = _checked(lambda: load_job_values(job_file)) if job_file else {}
    changes = {key: value for key, value in changes.items() if key not in ("inputs", "output")}
    changes |= dict(map(_change, change or []))
    set_storage(changes.get("storage_options") or {})
    chosen = Chosen(reason or (), stage or (), retryable)
    with _faults_told(), _progress_line() as show:
        runs = list(redriving.redrive(output, chosen, changes, beam_flags, on_progress=show))
    if not runs:
        _out.print(f"No dead letter of {output} is to be run again.", highlight=False, markup=False)
    for job, report in runs:
        _show_counts(job, report)
    for job, report in runs:
        _exit(job, report)


@app.command()
def finish(
    output: Annotated[str, typer.Argument(metavar="OUT", help="What --output was.", show_default=False)],
    run_id: Annotated[
        str, typer.Argument(metavar="RUN_ID", help="As the launcher's log says it.", show_default=False)
    ],
) -> None:
    """Close the books of a run that was submitted and left alone, as a Dataflow template leaves it.

    Ends as `run` would have. While the run goes on, it says what is missing, and nothing is written.
    """
    with _faults_told():
        job, report = finishing(output, run_id)
    _show_counts(job, report)
    _exit(job, report)


def _known(option: str, values: list[str], allowed: type[Reason] | type[Stage]) -> None:
    for value in values:
        if value not in [one.value for one in allowed]:
            stop(f"{option} is {value!r}; choose from {', '.join(one.value for one in allowed)}", EXIT_WRONG_JOB)


def _change(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found:
        stop(f"--set is {text!r}; it must be KEY=VALUE", EXIT_WRONG_JOB)
    try:
        return key.strip().replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        stop(f"--set {text}: the value is not YAML: {error}", EXIT_WRONG_JOB)


def _job(tokens: list[str], flags: dict[str, Any]) -> tuple[JobConfig, list[str]]:
    """Inputs or a job file, and what is Beam's."""
    inputs, beam_flags = split_beam_flags(tokens)
    job_files = [name for name in inputs if name.endswith((".yaml", ".yml"))]
    if not job_files:
        return make_job({"inputs": inputs, **flags}), beam_flags
    if len(job_files) > 1:
        raise JobError(f"one job file at a time, not {', '.join(job_files)}")
    values = load_job_values(job_files[0])
    others = [name for name in inputs if name not in job_files]
    if "watch" in flags:
        in_file = values.get("watch") or {}
        flags = flags | {"watch": in_file | flags["watch"] if isinstance(in_file, dict) else in_file}
    return make_job(values | flags | ({"inputs": others} if others else {}), job_files[0]), beam_flags


def _own_task(text: str) -> dict[str, str]:
    name, found, prompt = text.partition("=")
    if not found:
        stop(f"--prompt is {text!r}; it must be NAME=TEXT", EXIT_WRONG_JOB)
    return {"name": name.strip(), "prompt": prompt.strip()}


def _question(text: str) -> dict[str, Any]:
    asked, *choices = (part.strip() for part in text.split("|"))
    return {"question": asked, "choices": choices}


def _question_file(name: str) -> list[dict[str, Any]]:
    try:
        lines = [line for line in storage.read_bytes(name).decode("utf-8-sig").split("\n") if line.strip()]
        return [json.loads(line) if name.endswith(".jsonl") else _question(line) for line in lines]
    except (Rejected, storage.StorageError, ValueError) as error:
        stop(f"--questions {name}: {error}", EXIT_WRONG_JOB)


def _checked(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except JobError as error:
        stop(str(error), EXIT_WRONG_JOB)


def _run(job: JobConfig, beam_flags: list[str]) -> RunReport:
    with _faults_told():
        live = batch.is_in_process(beam_options(job, beam_flags))
        with _progress_line() if live else _no_progress() as show:
            return batch.run(job, beam_flags, on_progress=show)


def _watch(job: JobConfig, beam_flags: list[str]) -> RunReport | None:
    with _faults_told(), _signals_are(signal.SIG_IGN):  # Prism would get Ctrl-C too, and end before its time
        watching = streaming.Watch(job, beam_flags)
        _log.info("watching %s, run %s; Ctrl-C ends it", ", ".join(job.inputs), watching.run_id)
    told_at: list[float] = []
    with (
        _faults_told(),
        _progress_line() as show,
        _signals_are(lambda *_: told_at.append(time.monotonic())),
    ):
        _until_stopped(watching, show, told_at)
        return watching.report()


def _until_stopped(watching: streaming.Watch, show: Callable[[batch.Progress], None], told_at: list[float]) -> None:
    """Until it has ended; `told_at` is when signals came, which only this loop acts upon."""
    is_stopping = False
    while not watching.wait(0.5):
        show(watching.progress())
        if told_at and not is_stopping:
            _log.warning("stopping: what was found is written first; once more ends it now")
            try:
                watching.stop()
                is_stopping = True
            except storage.StorageError as error:
                _log.warning("it cannot be stopped now, which is tried again: %s", error)
        if told_at and told_at[-1] - told_at[0] > _SAME_SIGNAL_S:
            watching.cancel()
            return


@contextmanager
def _signals_are(handler: Any) -> Iterator[None]:
    before = {which: signal.signal(which, handler) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for which, earlier in before.items():
            signal.signal(which, earlier)


@contextmanager
def _faults_told() -> Iterator[None]:
    try:
        yield
    except (JobError, ModelError) as error:
        stop(str(error), EXIT_WRONG_JOB)
    except batch.RunFailed as error:
        _log.debug("the pipeline failed", exc_info=error)
        stop(f"the run failed: {error}", EXIT_FAILED)
    except (storage.StorageError, Rejected, NotATable) as error:
        stop(f"the output or the run's books cannot be read or written: {error}", EXIT_FAILED)


def _describe(progress: batch.Progress) -> str:
    speed = progress.audio_s / progress.elapsed_s if progress.elapsed_s else 0.0
    return (
        f"{progress.done} / {progress.found} recordings, {speed:.1f} audio s/s, "
        f"{progress.dead_letters} dead letters, {progress.elapsed_s:.0f} s"
    )


@contextmanager
def _progress_line() -> Iterator[Callable[[batch.Progress], None]]:
    """One line that is drawn over on a terminal; a log line every ten seconds otherwise."""
    if not sys.stderr.isatty():
        yield _LogEvery(10.0)
        return
    line = RichProgress(SpinnerColumn(), TextColumn("{task.description}"), console=_err, transient=True)
    with line:
        task = line.add_task("starting")
        yield lambda progress: line.update(task, description=_describe(progress))


class _LogEvery:
    """Logs progress when enough time has gone by and there is some."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next_s = seconds
        self._told: batch.Progress | None = None

    def __call__(self, progress: batch.Progress) -> None:
        counts = progress._replace(elapsed_s=0.0)
        if progress.elapsed_s >= self._next_s and counts != self._told:
            self._next_s, self._told = progress.elapsed_s + self._seconds, counts
            _log.info(_describe(progress))


@contextmanager
def _no_progress() -> Iterator[Callable[[batch.Progress], None]]:
    """Workers in other processes count there; the runner's own page or log shows how far they are."""
    _log.info("running on workers outside this process; counts follow at the end")
    yield lambda progress: None


def _rows(job: JobConfig, report: RunReport, tables: tuple[str, ...]) -> list[dict[str, Any]]:
    files = run_files(job.output, report.run_id)
    columns = {"dead_letters": ["uri", "stage", "reason", "detail"]}
    answer_columns = ["uri", "task", "question", "text", "duration_s", "end_s"]
    rows = [row for table in tables for row in read_rows(files[table], columns.get(table, answer_columns))]
    return sorted(rows, key=lambda row: str(row["uri"]))


def _show_answers(job: JobConfig, report: RunReport) -> None:
    by_uri: dict[str, dict[str, str]] = {}
    for row in _rows(job, report, ANSWER_TABLES):
        cells = by_uri.setdefault(row["uri"], {"seconds": f"{row['duration_s'] or row['end_s']:.1f}"})
        cells[row["question"] or row["task"]] = row["text"]
    titles = list(dict.fromkeys(title for cells in by_uri.values() for title in cells))
    table = Table(title="Answers", title_justify="left")
    table.add_column("recording", overflow="fold")
    for title in titles:
        table.add_column(title)
    for uri, cells in by_uri.items():
        table.add_row(storage.name(uri), *(cells.get(title, "") for title in titles))
    _out.print(table, markup=False)


def _show_dead_letters(job: JobConfig, report: RunReport) -> None:
    table = Table("recording", "stage", "reason", "detail", title="Dead letters", title_justify="left")
    for row in _rows(job, report, ("dead_letters",)):
        table.add_row(storage.name(row["uri"]), row["stage"], row["reason"], row["detail"])
    _out.print(table, markup=False)


def _show_counts(job: JobConfig, report: RunReport) -> None:
    counts = report.counts
    states = ", ".join(f"{number} {state}" for state, number in sorted(counts.states.items())) or "none"
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.dead_letters.items()))
    answers = ", ".join(f"{number} in {table}/" for table, number in counts.answers.items()) or "none"
    kept = counts.kept_dead_letters
    speed = counts.audio_s / report.wall_s if report.wall_s else 0.0
    balance = "reconciles" if counts.reconciled else "DOES NOT RECONCILE"
    for line in (
        f"Recordings: {counts.found} found = {states} ({balance})",
        f"Answers: {answers}",
        f"Dead letters: {reasons or 'none'}" + (f"; {counts.kept_dead_letters} of earlier runs hold" if kept else ""),
        f"Audio: {counts.audio_s:.1f} s in {report.wall_s:.1f} s, {speed:.1f} seconds of audio per second",
        *([_verified(report.verified)] if report.verified else []),
        f"Written to {job.output}; the run's record is {storage.join(job.output, '_runs', report.run_id)}.json",
    ):
        _out.print(line, highlight=False, markup=False, soft_wrap=True)


def _verified(verified: Verified) -> str:
    line = (
        f"Verified {verified.requests} requests by plain generate: "
        f"{verified.equal} of {verified.replies} replies equal"
    )
    if verified.equal < verified.replies and not verified.wrong:
        share = verified.equal / verified.replies
        line += f" ({share:.1%}; rounding in {', '.join(verified.dtypes)} makes some differ)"
    if verified.not_asked:
        missed, first = verified.sampled - verified.requests, verified.not_asked[0]
        line += f"; {missed} could not be asked again, for example {first.uri}: {first.detail}"
    return line


def _exit(job: JobConfig, report: RunReport) -> None:
    counts = report.counts
    if not counts.reconciled:
        stop("the counts do not reconcile: " + "; ".join(counts.problems), EXIT_FAILED)
    if report.unverified:
        stop(f"the replies do not verify: {report.unverified}", EXIT_FAILED)
    dead_letters = sum(counts.dead_letters.values()) + counts.kept_dead_letters
    if dead_letters > job.dead_letters_allowed(counts.found):
        stop(
            f"{dead_letters} dead letters are more than --fail-on-dead-letters {job.fail_on_dead_letters} allows",
            EXIT_DEAD_LETTERS,
        )


app.command()(cli_output.audit)
app.command()(cli_output.compact)
app.command()(cli_output.export)
