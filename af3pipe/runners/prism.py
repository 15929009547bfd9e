"""Beam's Prism runner, which runs streams on one machine."""

import shutil
from typing import ClassVar

from apache_beam import __version__ as beam_version
from apache_beam.options.pipeline_options import PortableOptions, PrismRunnerOptions

from af3pipe.runners.job_server import JobServerRunner
from af3pipe.runners.parser import option_names


class Prism(JobServerRunner):
    """Starts Prism, a program that Beam downloads unless it is installed."""

    flags: ClassVar = JobServerRunner.flags | option_names(PrismRunnerOptions)

    @property
    def workers_are_here(self) -> bool:
        return self.options.view_as(PortableOptions).environment_type in (None, "LOOPBACK")

    def configure(self) -> None:
        super().configure()
        prism = self.options.view_as(PrismRunnerOptions)
        if not prism.prism_location:  # Beam looks at no path, and would download one
            prism.prism_location = shutil.which("prism")

    def explain_start(self, text: str) -> str:
        build = f"go install github.com/apache/beam/sdks/v2/go/cmd/prism@v{beam_version}"
        return (
            f"cannot start Prism, Beam's runner for streams on one machine: {text}. Where it cannot be downloaded, "
            f"build it (`{build}`) and put it on the path or give --prism-location"
        )
