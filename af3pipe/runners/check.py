"""Whether a job's runner can be reached and has what it needs, found out before anything is started or written."""

import http.client
import importlib
import json
import logging
import shutil
import socket
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import grpc
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    JobServerOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
    WorkerOptions,
)
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc
from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES, FlinkRunner

_TIMEOUT_S = 4.0  # each of at most two waits, so that it is told within 10 s
_POOL = "python -m apache_beam.runners.worker.worker_pool_main --service_port 50000"
_log = logging.getLogger(__name__)


class RunnerError(Exception):
    """A runner cannot be used as it is configured: says what to start or to set."""


def check_runner(options: PipelineOptions) -> None:
    """Asks what a job would be submitted to whether it is there; in-process runners need nothing.

    Raises:
        RunnerError: The cluster or the job server does not answer, or something that the runner needs is missing:
            says which address, and what to start or to set.
    """
    runner = options.view_as(StandardOptions).runner
    if runner == "DataflowRunner":
        _check_dataflow(options)
    if runner not in ("FlinkRunner", "PortableRunner", "PrismRunner", "SparkRunner"):
        return
    endpoint = options.view_as(PortableOptions).job_endpoint
    if endpoint == "embed":
        return
    if endpoint:
        _check_job_server(endpoint)
    elif runner == "PortableRunner":
        raise RunnerError(
            "the portable runner needs --job-endpoint HOST:PORT, the address of a running job server; or name the "
            "runner that is to start one: --runner flink, --runner prism"
        )
    elif runner == "FlinkRunner":
        _check_flink(options)
    if runner in ("FlinkRunner", "PortableRunner"):
        _check_environment(options, endpoint)


def _check_flink(options: PipelineOptions) -> None:
    """What Beam needs to start a job server of its own for a cluster."""
    flink, server = options.view_as(FlinkRunnerOptions), options.view_as(JobServerOptions)
    master = flink.flink_master.strip()
    if master not in MAGIC_HOST_NAMES:
        version = _flink_version(FlinkRunner.add_http_scheme(master).rstrip("/"))
        theirs = ".".join(version.split(".")[:2])
        if theirs != flink.flink_version and not flink.flink_job_server_jar:
            published = flink.PUBLISHED_FLINK_VERSIONS
            what = f"add --flink-version {theirs}" if theirs in published else f"Beam has one for {published}"
            raise RunnerError(
                f"Flink at {master} is {version}, and the job server would be for {flink.flink_version}: {what}"
            )
    if not flink.flink_submit_uber_jar and not shutil.which(server.job_server_java_launcher):
        raise RunnerError(
            f"the Flink runner starts Beam's job server, which needs {server.job_server_java_launcher!r}, and that "
            "is not on the path. Install a Java runtime, or start the job server elsewhere and name it: "
            "--job-endpoint HOST:8099"
        )


def _flink_version(url: str) -> str:
    # Directly: it is Java that will go there, which knows nothing of a proxy in the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/config", timeout=_TIMEOUT_S) as reply:
            return str(json.load(reply)["flink-version"])
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", None) or error
        raise RunnerError(
            f"no Flink cluster answers at {url} ({_in_words(reason)}), which is --flink-master. Start the session "
            "cluster (Flink's bin/start-cluster.sh), or correct the address: that of its REST API and web page, port "
            "8081 unless its rest.port says otherwise"
        ) from error


def _check_job_server(endpoint: str) -> None:
    with grpc.insecure_channel(endpoint) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_TIMEOUT_S)
            service = beam_job_api_pb2_grpc.JobServiceStub(channel)
            service.DescribePipelineOptions(beam_job_api_pb2.DescribePipelineOptionsRequest(), timeout=_TIMEOUT_S)
        except (grpc.FutureTimeoutError, grpc.RpcError) as error:
            why = f"no gRPC server there answered within {_TIMEOUT_S:g} s"
            if isinstance(error, grpc.RpcError):  # a worker pool, for example
                why = f"the server there is something else: {error.code().name}"
            raise RunnerError(
                f"no job server answers at {endpoint} ({why}), which is --job-endpoint. Start Beam's job server for "
                "your runner (for Flink: java -jar beam-runners-flink-VERSION-job-server.jar --flink-master "
                "HOST:8081; for Prism: prism), or correct the address; the port is 8099 or 8073 unless it was told "
                "another"
            ) from error


def _check_environment(options: PipelineOptions, endpoint: str | None) -> None:
    """Where the workers are. The address of a pool is the cluster's to resolve, so that it is only warned of."""
    portable = options.view_as(PortableOptions)
    master = options.view_as(FlinkRunnerOptions).flink_master
    told = (
        portable.environment_type,
        portable.environment_config,
        options.view_as(WorkerOptions).sdk_container_image,
    )
    if told == (None, None, None) and (endpoint or master not in MAGIC_HOST_NAMES):
        raise RunnerError(
            "where do the workers run? Beam would start its own Docker image, which has no af3pipe. Add "
            "--environment-type EXTERNAL --environment-config HOST:PORT for worker pools beside the task managers "
            f"(there: {_POOL}), or --environment-type DOCKER --environment-config IMAGE for an image with af3pipe, "
            "or --environment-type LOOPBACK to have them here"
        )
    if (portable.environment_type or "").upper() != "EXTERNAL":
        return
    host, _, port = (portable.environment_config or "").rpartition(":")
    runs_at = urlsplit(f"//{endpoint}" if endpoint else FlinkRunner.add_http_scheme(master)).hostname
    if not port.isdecimal() or (_is_loopback(host) and not _is_loopback(runs_at)):
        return  # as the task managers see it
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError as error:
        _log.warning(
            "no worker pool answers at %s:%s from here (%s). If none does from the task managers either, the job "
            "waits for ever: start one beside each, with a PATH on which the first `python` is one that has af3pipe: "
            "%s",
            host,
            port,
            _in_words(error),
            _POOL.replace("50000", port),
        )


def _check_dataflow(options: PipelineOptions) -> None:
    google = options.view_as(GoogleCloudOptions)
    needed = {
        "--project PROJECT": google.project,
        "--temp-location gs://BUCKET/FOLDER": google.temp_location,
        "--region REGION": google.region or DataflowRunner().get_default_gcp_region(),
    }
    missing = [flag for flag, value in needed.items() if not value]
    if missing:
        raise RunnerError(
            f"the Dataflow runner needs {' and '.join(missing)}; as keys of a job file they stand below `beam`"
        )
    if not google.temp_location.startswith("gs://"):
        raise RunnerError(
            f"temp_location is {google.temp_location!r}; Dataflow needs a folder on Google Cloud Storage, gs://..."
        )
    try:
        importlib.import_module("apache_beam.runners.dataflow.internal.apiclient")  # an optional part of Beam
    except ImportError as error:
        raise RunnerError(
            f"the Dataflow runner needs {error.name or error}: pip install 'apache-beam[gcp]'"
        ) from error


def _is_loopback(host: str | None) -> bool:
    return host in (None, "localhost", "::1", "[::1]") or str(host).startswith("127.")


def _in_words(error: object) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
