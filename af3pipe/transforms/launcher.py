"""Checks that a worker has the same versions as the launcher, which is the process that built the graph.

Beam sends the graph pickled. A worker with another af3pipe, Beam or Python may fail to unpickle it, or unpickle it to
something else, without saying why. So pickled objects begin with the launcher's versions, which the worker compares
first: before it looks up any class of this package, and long before it runs the model.
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
    """A worker cannot run this job, which fails the job; the message says which worker, why, and what to install."""


class Launcher(NamedTuple):
    """Identifies the process that built the graph, and its versions. Unpickling it compares the versions.

    Attributes:
        af3pipe: Version of af3pipe.
        beam: Version of Beam, without the patch number.
        python: Version of Python, without the patch number; another one cannot run the byte code that Beam sends.
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
        """Whether the launcher is the current process."""
        return (self.host, self.pid) == (socket.gethostname(), os.getpid())


def this_process() -> Launcher:
    """Returns a `Launcher` for the current process."""
    beam_version = ".".join(beam.__version__.split(".")[:2])
    python = ".".join(platform.python_version_tuple()[:2])
    return Launcher(__version__, beam_version, python, socket.gethostname(), os.getpid())


def received(*launcher: Any) -> Launcher:
    """Unpickles a `Launcher` and compares its versions. Pickles contain this name and module: do not rename it.

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
            f"the same version on both; the worker runs {sys.executable}"
        )
    return there


class SentByLauncher:
    """Makes pickles of its subclasses begin with the launcher's versions (mixin)."""

    launcher: Launcher | None = None
    """The process that pickled this object; None if it was not unpickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *state = reduced
        return _made, (this_process(), make, arguments), *state

    @contextmanager
    def naming_worker(self) -> Iterator[None]:
        """Adds the worker's host name to a ModelError, since the launcher may be able to open the same model."""
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
    """Starts a graph: outputs `names` after a worker was found to have the launcher's versions.

    The first stage contains nothing that another Python could not unpickle, and ends before the next stage begins.
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
