"""Finds the class for the runner of a job, checks it, and finds options that belong to another runner."""

from collections.abc import Iterable

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from af3pipe.runners.dataflow import Dataflow
from af3pipe.runners.flink import Flink
from af3pipe.runners.job_server import KafkaStreams, Spark
from af3pipe.runners.local import Local
from af3pipe.runners.names import IN_PROCESS, short_name
from af3pipe.runners.portable import Portable
from af3pipe.runners.prism import Prism
from af3pipe.runners.runner import Runner

_RUNNERS: dict[str, type[Runner]] = {  # in the order in which a message proposes them
    "DataflowRunner": Dataflow,
    "FlinkRunner": Flink,
    "PortableRunner": Portable,
    "PrismRunner": Prism,
    **dict.fromkeys(IN_PROCESS, Local),
    "SparkRunner": Spark,
    "KafkaStreamsRunner": KafkaStreams,
}


def runner_of(options: PipelineOptions) -> Runner:
    """Returns the runner that a job's options select; a plain `Runner` for one that this package does not know."""
    return _RUNNERS.get(options.view_as(StandardOptions).runner, Runner)(options)


def check_runner(options: PipelineOptions) -> None:
    """Checks that a job's runner can be reached and has what it needs; in-process runners need nothing.

    Raises:
        RunnerError: The cluster or the job server does not respond, or something that the runner needs is missing:
            the message says which address, and what to start or to set.
    """
    runner_of(options).check()


def options_of_others(runner: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Finds Beam options that a runner ignores, since only other runners read them.

    Args:
        runner: Beam's name of the runner.
        names: Of options, as Beam spells them.

    Returns:
        By option, the short names of the runners that read it. None where the runner is one that this package does
        not know, and for options that all runners read.
    """
    if runner not in _RUNNERS:
        return {}
    readers = {
        name: list(dict.fromkeys(short_name(other) for other, cls in _RUNNERS.items() if name in cls.flags))
        for name in names
        if name not in _RUNNERS[runner].flags
    }
    return {name: others for name, others in readers.items() if others}
