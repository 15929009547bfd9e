"""What a worker must have in common with the launcher, the process that built the graph.

A graph travels pickled. Another af3pipe, Beam or Python on the worker may fail to unpickle it, or unpickle it to
something else, and neither says why. So what is sent begins with the launcher's versions: whoever unpickles it
compares them first, before any class of this package is looked up and long before anything is paid for.
"""

import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import apache_beam as beam

from af3pipe import __version__
from af3pipe.models.engine import ModelError


class WorkerError(Exception):
    """A worker is not fit for this job: says which, why, and what to install there. Ends the job."""


class Launcher(NamedTuple):
    """The process that built the graph. Unpickling one compares the versions.

    Attributes:
        af3pipe: Its version.
        beam: Beam's, without the patch.
        python: Python's, without the patch: another one cannot run the functions that Beam sends as byte code.
    """

    af3pipe: str
    beam: str
    python: str
    host: str
    pid: int

    def __reduce__(self) -> Any:
        return received, tuple(self)

    @property
    def is_this_process(self) -> bool:
        """Whether nothing was sent anywhere."""
        return (self.host, self.pid) == (socket.gethostname(), os.getpid())


def this_process() -> Launcher:
    """This process as a launcher."""
    beam_version = ".".join(beam.__version__.split(".")[:2])
    python = ".".join(platform.python_version_tuple()[:2])
    return Launcher(__version__, beam_version, python, socket.gethostname(), os.getpid())


def received(*launcher: Any) -> Launcher:
    """What a pickled `Launcher` becomes where it arrives. Its name and place are part of what is sent: keep them.

    Raises:
        WorkerError: This process has other versions.
    """
    there, here = Launcher(*launcher), this_process()
    names = {"af3pipe": "af3pipe", "beam": "Apache Beam", "python": "Python"}
    differing = [
        f"{name} {getattr(here, key)} (launcher: {getattr(there, key)})"
        for key, name in names.items()
        if getattr(here, key) != getattr(there, key)
    ]
    if differing:
        raise WorkerError(
            f"worker {here.host} has another version than the launcher {there.host}: {', '.join(differing)}. Install "
            f"the same on both, here or there; the worker runs {sys.executable}"
        )
    return there


class SentByLauncher:
    """A mixin: pickled, it is preceded by the versions it was pickled with."""

    launcher: Launcher | None = None
    """Who sent this; None where it was never sent."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *state = reduced
        return _made, (this_process(), make, arguments), *state

    @contextmanager
    def telling_where(self) -> Iterator[None]:
        """Has a model that cannot be opened on a worker say on which, since the launcher may well have it."""
        try:
            yield
        except ModelError as error:
            if self.launcher is None or self.launcher.is_this_process:
                raise
            raise ModelError(f"worker {socket.gethostname()}: {str(error).rstrip('.')}. {_TO_DO}") from error


_TO_DO = (
    "The model must be on every worker: in its image, or mounted, at this same absolute path; or name a hub id "
    "that workers can download"
)


def _made(launcher: Launcher, make: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    made = make(*arguments)
    made.launcher = launcher
    return made


class CheckWorkers(beam.PTransform):
    """Starts a graph: gives `names` once a worker was found to have the launcher's versions.

    The first stage has nothing in it that another Python could not unpickle, and ends before the next one begins.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = list(dict.fromkeys(names))

    def expand(self, pipeline: Any) -> Any:
        return (
            pipeline
            | "Begin" >> beam.Impulse()
            | "Check" >> beam.ParDo(_CheckDoFn(self._names)).with_output_types(tuple[str, None])
            | "ByName" >> beam.GroupByKey()
            | "Names" >> beam.Keys().with_output_types(str)
        )


class _CheckDoFn(SentByLauncher, beam.DoFn):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def process(self, element: bytes) -> Iterator[tuple[str, None]]:
        for name in self._names:
            yield name, None
