"""Runs the commands that `jobs` declares: creates the job, runs it, prints its counts."""

import logging
import signal
import sqlite3
import tempfile
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from af3pipe import storage
from af3pipe.cli.console import EXIT_FAILED, EXIT_WRONG_JOB, OUT, stop
from af3pipe.cli.outputs import require_output
from af3pipe.cli.progress import no_progress, progress_line
from af3pipe.cli.results import exit_by, show_answers, show_counts, show_dead_letters
from af3pipe.models.engine import ModelError
from af3pipe.pipelines import batch, streaming
from af3pipe.pipelines import redrive as redriving
from af3pipe.pipelines.beam_flags import beam_options, split_beam_flags
from af3pipe.pipelines.job import JobConfig, JobError, make_job
from af3pipe.pipelines.job_file import load_job_values, load_yaml, merge_job
from af3pipe.pipelines.report import RunReport
from af3pipe.pipelines.submit import finish as finishing
from af3pipe.runners.check import runner_of
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.tables.latest import NotATable
from af3pipe.transforms.stores import set_storage

_SAME_SIGNAL_S = 1.0  # a terminal and a program that waits for this one may both pass one on
_CANCELLED = "cancelled; the next run or watch with the same --output processes what was not written"

_log = logging.getLogger("af3pipe")


def demo(output: str) -> None:
    """Runs `af3pipe demo`."""
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
        report = run_job(job, [])
    show_answers(job, report)
    OUT.print("The tiny model makes words up when it transcribes audio without speech.\n", style="dim")
    show_dead_letters(job, report)
    show_counts(job, report)
    exit_by(job, report)


def run(inputs: list[str], flags: dict[str, Any]) -> None:
    """Runs `af3pipe run`: `inputs` may be a job file, `flags` are keys of a job."""
    job, beam_flags = _checked(lambda: merge_job(inputs, flags))
    report = run_job(job, beam_flags)
    show_counts(job, report)
    exit_by(job, report)


def watch(inputs: list[str], flags: dict[str, Any]) -> None:
    """Runs `af3pipe watch`, with what `run` takes."""
    job, beam_flags = _checked(lambda: merge_job(inputs, flags))
    report = watch_job(job, beam_flags)
    if report is None:
        stop(_CANCELLED, EXIT_FAILED)
    show_counts(job, report)
    exit_by(job, report)


def redrive(
    output: str,
    tokens: list[str],
    reasons: list[str],
    stages: list[str],
    retryable: bool | None,
    changes: list[str],
    job_file: str | None,
) -> None:
    """Runs `af3pipe redrive`; `tokens` are options that are not its own."""
    _known("--reason", reasons, Reason)
    _known("--stage", stages, Stage)
    others, beam_flags = _checked(lambda: split_beam_flags(tokens))
    if others:
        stop(f"redrive takes one OUT, not also {' '.join(others)}", EXIT_WRONG_JOB)
    values = _checked(lambda: load_job_values(job_file)) if job_file else {}
    values = {key: value for key, value in values.items() if key not in ("inputs", "output")}
    values |= dict(map(_change, changes))
    set_storage(values.get("storage_options") or {})
    chosen = redriving.Chosen(reasons, stages, retryable)
    with _errors_end():
        require_output(output)
    with _errors_end(), progress_line() as show:
        runs = list(redriving.redrive(output, chosen, values, beam_flags, on_progress=show))
    if not runs:
        OUT.print(f"No dead letter of {output} is selected.", highlight=False, markup=False)
    for job, report in runs:
        show_counts(job, report)
    for job, report in runs:
        exit_by(job, report)


def finish(output: str, run_id: str) -> None:
    """Runs `af3pipe finish`."""
    with _errors_end():
        require_output(output)
        job, report = finishing(output, run_id)
    show_counts(job, report)
    exit_by(job, report)


@contextmanager
def _demo_inputs() -> Iterator[list[str]]:
    """Yields the clips in the package, and 601 s of silence, which is longer than the model's maximum duration."""
    with (
        resources.as_file(resources.files("af3pipe.demo") / "clips") as clips,
        tempfile.TemporaryDirectory(prefix="af3pipe-demo-") as folder,
    ):
        with wave.open(str(Path(folder) / "over_length.wav"), "wb") as file:
            file.setparams((1, 1, 8_000, 0, "NONE", "not compressed"))
            file.writeframes(b"\x80" * 601 * 8_000)  # 8-bit WAV is unsigned: 128 is silence
        yield [str(clips), folder]


def _known(option: str, values: list[str], allowed: type[Reason] | type[Stage]) -> None:
    for value in values:
        if value not in [one.value for one in allowed]:
            stop(f"{option} is {value!r}; choose from {', '.join(one.value for one in allowed)}", EXIT_WRONG_JOB)


def _change(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found:
        stop(f"--set is {text!r}; it must be KEY=VALUE", EXIT_WRONG_JOB)
    try:
        return key.strip().replace("-", "_"), load_yaml(value)
    except yaml.YAMLError as error:
        stop(f"--set {text}: the value is not YAML: {error}", EXIT_WRONG_JOB)


def _checked(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except JobError as error:
        stop(str(error), EXIT_WRONG_JOB)


def run_job(job: JobConfig, beam_flags: list[str]) -> RunReport:
    """Runs a batch job to its end, and shows its progress."""
    with _errors_end():
        live = runner_of(beam_options(job, beam_flags)).is_in_process
        with progress_line() if live else no_progress() as show:
            return batch.run(job, beam_flags, on_progress=show)


def watch_job(job: JobConfig, beam_flags: list[str]) -> RunReport | None:
    """Runs a watch until a signal stops it; a second signal cancels it, and ends the program.

    Returns:
        The report of the watch; None if it was cancelled at its runner.
    """
    with _errors_end(), _signals_are(signal.SIG_IGN):  # Prism would get Ctrl-C too, and end before its time
        watching = streaming.Watch(job, beam_flags)
        _log.info("watching %s, run %s; Ctrl-C ends it", ", ".join(job.inputs), watching.run_id)
    received: list[_Signal] = []
    with (
        _errors_end(),
        progress_line() as show,
        _signals_are(lambda number, _: received.append(_Signal(number, time.monotonic()))),
    ):
        _until_stopped(watching, show, received)
        report = watching.report()
    if report is None and received:
        stop(_CANCELLED, 128 + received[-1].number)
    return report


class _Signal(NamedTuple):
    number: int
    at_s: float


def _until_stopped(
    watching: streaming.Watch, show: Callable[[batch.Progress], None], received: list[_Signal]
) -> None:
    """Waits until the watch has ended; handles the signals, which a handler only collects."""
    is_stopping = False
    while not watching.wait(0.5):
        show(watching.progress())
        if received and not is_stopping:
            _log.warning("stopping when what was found is written; a second signal ends it at once")
            try:
                watching.stop()
                is_stopping = True
            except storage.StorageError as error:
                _log.warning("the watch could not be stopped, which is tried again: %s", error)
        if received and received[-1].at_s - received[0].at_s > _SAME_SIGNAL_S:
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
def _errors_end() -> Iterator[None]:
    """Ends the program with a message and an exit code if its block raises an error that the user can fix."""
    try:
        yield
    except (JobError, ModelError) as error:
        stop(str(error), EXIT_WRONG_JOB)
    except batch.RunFailed as error:
        _log.debug("the pipeline failed", exc_info=error)
        full = f"; is the folder for temporary files full ({tempfile.gettempdir()}, set by TMPDIR)?"
        stop(f"the run failed: {error}{full if isinstance(error.__cause__, sqlite3.Error) else ''}", EXIT_FAILED)
    except (storage.StorageError, Rejected, NotATable) as error:
        stop(f"the output cannot be read or written: {error}", EXIT_FAILED)
