"""Shows the progress of a run: one line on a terminal, log lines elsewhere."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress as RichProgress
from rich.progress import SpinnerColumn, TextColumn

from af3pipe.cli.console import ERR
from af3pipe.pipelines.batch import Progress

_log = logging.getLogger("af3pipe")


@contextmanager
def progress_line() -> Iterator[Callable[[Progress], None]]:
    """Updates one line on a terminal; otherwise logs a line every ten seconds."""
    if not sys.stderr.isatty():
        yield _LogEvery(10.0)
        return
    line = RichProgress(SpinnerColumn(), TextColumn("{task.description}"), console=ERR, transient=True)
    with line:
        task = line.add_task("starting")
        yield lambda progress: line.update(task, description=_describe(progress))


@contextmanager
def no_progress() -> Iterator[Callable[[Progress], None]]:
    """Shows nothing: remote workers count for themselves, and the runner shows their progress."""
    _log.info("running on workers outside this process; counts follow at the end")
    yield lambda progress: None


class _LogEvery:
    """Logs the progress if enough time has passed and there is some."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next_s = seconds
        self._logged: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        counts = progress._replace(elapsed_s=0.0)
        if progress.elapsed_s >= self._next_s and counts != self._logged:
            self._next_s, self._logged = progress.elapsed_s + self._seconds, counts
            _log.info(_describe(progress))


def _describe(progress: Progress) -> str:
    speed = progress.audio_s / progress.elapsed_s if progress.elapsed_s else 0.0
    return (
        f"{progress.done} / {progress.found} recordings, {speed:.1f} audio s/s, "
        f"{progress.dead_letters} dead letters, {progress.elapsed_s:.0f} s"
    )
