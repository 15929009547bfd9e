"""Beam's in-process runners."""

from typing import ClassVar

from apache_beam.options.pipeline_options import DirectOptions, StandardOptions

from af3pipe.runners.parser import option_names
from af3pipe.runners.runner import Runner, RunnerError


class Local(Runner):
    """Runs the pipeline in this process, or in worker processes that it starts (`multi_processing`)."""

    flags: ClassVar = option_names(DirectOptions)

    @property
    def is_in_process(self) -> bool:
        return self._mode != "multi_processing"

    @property
    def workers_are_here(self) -> bool:
        return True

    @property
    def _mode(self) -> str | None:
        found: str | None = self.options.get_all_options().get("direct_running_mode")
        return found

    def configure(self) -> None:
        # 0 workers are as many as there are cores.
        if self._mode == "multi_threading" and self.options.view_as(DirectOptions).direct_num_workers != 1:
            raise RunnerError(
                "direct_running_mode is 'multi_threading' with several workers, which loses elements in Beam's "
                "in-process runner; use multi_processing"
            )

    def configure_stream(self) -> None:
        raise RunnerError(
            f"runner {self.options.view_as(StandardOptions).runner} writes nothing before its input ends, and a "
            "watched input does not end; leave --runner out, which takes Prism, or name Flink or Dataflow"
        )
