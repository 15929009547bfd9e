"""Defines what a pipeline needs from the Beam runner that it runs on."""

from collections.abc import Collection
from typing import ClassVar

from apache_beam.options.pipeline_options import PipelineOptions


class RunnerError(Exception):
    """A runner cannot be used as it is configured; the message says what to start or to set."""


class Runner:
    """A Beam runner with the options of one job. This base class serves runners that need nothing special.

    Attributes:
        options: Beam's options of the job; some methods change them.
        flags: Names of Beam options that only this runner, and runners like it, read.
        ends_by_itself: Whether a streaming job ends when its inputs have ended.
    """

    flags: ClassVar[Collection[str]] = ()
    ends_by_itself: ClassVar[bool] = True

    def __init__(self, options: PipelineOptions) -> None:
        self.options = options

    @property
    def is_in_process(self) -> bool:
        """Whether the pipeline runs in this process, so that its counters can be read while it runs."""
        return False

    @property
    def workers_are_here(self) -> bool:
        """Whether the workers run on this machine, which then needs the model."""
        return False

    def configure(self) -> None:
        """Corrects defaults of Beam that harm this package's jobs.

        Raises:
            RunnerError: An option makes this runner lose elements.
        """

    def configure_stream(self) -> None:
        """Sets what a streaming job needs.

        Raises:
            RunnerError: This runner does not stream.
        """

    def check(self) -> None:
        """Checks that the runner can be reached and has what it needs, before anything is started or written.

        Raises:
            RunnerError: The message says which address or option is wrong, and what to start or to set.
        """

    def name_job(self, run_id: str) -> None:
        """Gives the job a name that is unique at its cluster, where `cancel_job` needs one."""

    def cancel_job(self) -> None:
        """Cancels the job where it would outlive this process; logs what to do where that is impossible."""

    def explain_start(self, text: str) -> str:
        """Returns the message for a runner that could not be started."""
        return text
