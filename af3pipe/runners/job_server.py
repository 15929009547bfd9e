"""Beam runners that take jobs through a job server: its address is checked, and its time limit is lifted."""

import signal
from typing import Any, ClassVar

import grpc
from apache_beam.options.pipeline_options import (
    JobServerOptions,
    KafkaStreamsRunnerOptions,
    PortableOptions,
    SparkRunnerOptions,
)
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc
from apache_beam.runners.portability import job_server as beam_job_server
from apache_beam.runners.worker import sdk_worker

from af3pipe.runners.parser import option_names
from af3pipe.runners.runner import Runner, RunnerError

TIMEOUT_S = 4.0  # each of at most two waits, so that an address that does not answer is reported within 10 s
_A_YEAR_S = 365 * 24 * 3600


class JobServerRunner(Runner):
    """Uses a job server: the one at `--job-endpoint`, else one that Beam starts."""

    flags: ClassVar = option_names(PortableOptions, JobServerOptions) | {
        "sdk_container_image",
        "worker_harness_container_image",
    }

    @property
    def job_endpoint(self) -> str | None:
        """Address of the job server; `embed` for one in this process, None for one that Beam starts."""
        endpoint: str | None = self.options.view_as(PortableOptions).job_endpoint
        return endpoint

    def configure(self) -> None:
        # Beam ends the stream of a job's states when this is over, however well the job is: 300 s by default.
        portable = self.options.view_as(PortableOptions)
        if portable.job_server_timeout == PortableOptions([]).job_server_timeout:
            portable.job_server_timeout = _A_YEAR_S
        vars(beam_job_server)["signal"] = _NoHandlers()
        # A worker in this process prints the traceback of a failure that it logs, too.
        vars(sdk_worker)["print"] = lambda *_, **__: None

    def check(self) -> None:
        if self.job_endpoint == "embed":
            return
        if self.job_endpoint:
            _check_job_server(self.job_endpoint)
        else:
            self.check_own_server()
        self.check_environment()

    def check_own_server(self) -> None:
        """Checks what Beam needs to start a job server.

        Raises:
            RunnerError: Something is missing.
        """

    def check_environment(self) -> None:
        """Checks that the options say where the workers run.

        Raises:
            RunnerError: They do not.
        """


class _NoHandlers:
    """Replaces `signal` in Beam's module of job servers, which handles Ctrl-C when it starts one.

    Only the main thread may set a handler, and jobs are started on another one; the program handles Ctrl-C itself.
    """

    SIGINT = signal.SIGINT
    getsignal = staticmethod(signal.getsignal)

    @staticmethod
    def signal(number: int, handler: Any) -> Any:
        return signal.getsignal(number)


class Spark(JobServerRunner):
    """Beam's Spark runner, on which nothing of this package is tested."""

    flags: ClassVar = JobServerRunner.flags | option_names(SparkRunnerOptions)


class KafkaStreams(JobServerRunner):
    """Beam's Kafka Streams runner, on which nothing of this package is tested."""

    flags: ClassVar = JobServerRunner.flags | option_names(KafkaStreamsRunnerOptions)


def _check_job_server(endpoint: str) -> None:
    with grpc.insecure_channel(endpoint) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=TIMEOUT_S)
            service = beam_job_api_pb2_grpc.JobServiceStub(channel)
            service.DescribePipelineOptions(beam_job_api_pb2.DescribePipelineOptionsRequest(), timeout=TIMEOUT_S)
        except (grpc.FutureTimeoutError, grpc.RpcError) as error:
            why = f"no gRPC server there answered within {TIMEOUT_S:g} s"
            if isinstance(error, grpc.RpcError):  # a worker pool, for example
                why = f"the server there is something else: {error.code().name}"
            raise RunnerError(
                f"no job server answers at {endpoint} ({why}), which is --job-endpoint. Start Beam's job server for "
                "your runner (for Flink: java -jar beam-runners-flink-VERSION-job-server.jar --flink-master "
                "HOST:8081; for Prism: prism), or correct the address; the default port is 8099, Prism's 8073"
            ) from error
