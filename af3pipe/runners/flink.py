"""Beam's Flink runner: checks the cluster, names jobs, cancels them, and has streams make checkpoints."""

import http.client
import json
import logging
import shutil
import socket
import urllib.error
import urllib.request
from typing import Any, ClassVar
from urllib.parse import urlsplit

from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    JobServerOptions,
    PortableOptions,
    WorkerOptions,
)
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES, FlinkRunner

from af3pipe.runners.flink_options import FlinkOptions
from af3pipe.runners.job_server import TIMEOUT_S, JobServerRunner
from af3pipe.runners.parser import option_names
from af3pipe.runners.runner import RunnerError

_CANCEL_TIMEOUT_S = 10
_CHECKPOINT_MS = 10_000
_POOL = "python -m apache_beam.runners.worker.worker_pool_main --service_port 50000"
_log = logging.getLogger(__name__)


class Flink(JobServerRunner):
    """Submits to a Flink cluster, or starts one for the job."""

    flags: ClassVar = JobServerRunner.flags | option_names(FlinkRunnerOptions, FlinkOptions)
    ends_by_itself: ClassVar = False  # the sources of a stream stay open after their end, for the checkpoints

    @property
    def _master(self) -> str:
        return str(self.options.view_as(FlinkRunnerOptions).flink_master).strip()

    @property
    def _rest_url(self) -> str | None:
        """URL of the cluster's REST API; None where the options do not name a cluster."""
        if self._master in MAGIC_HOST_NAMES:
            return None
        return str(FlinkRunner.add_http_scheme(self._master)).rstrip("/")

    @property
    def _cluster_is_own(self) -> bool:
        """Whether Beam starts a Flink for this job alone, in a job server that ends with this process."""
        return self._rest_url is None and not self.job_endpoint

    def configure_stream(self) -> None:
        # A bundle that is not full ends at a checkpoint. Sources may not shut down (shutdown_sources_after_idle_ms):
        # where its input has ended, a step fires all timers at once, the clock's without end, and no checkpoint can
        # be finished.
        flink = self.options.view_as(FlinkOptions)
        if flink.checkpointing_interval is None:
            flink.checkpointing_interval = _CHECKPOINT_MS
        if flink.finish_bundle_before_checkpointing is None:
            flink.finish_bundle_before_checkpointing = True

    def check_own_server(self) -> None:
        flink, server = self.options.view_as(FlinkRunnerOptions), self.options.view_as(JobServerOptions)
        if self._rest_url is not None:
            version = _flink_version(self._rest_url)
            theirs = ".".join(version.split(".")[:2])
            if theirs != flink.flink_version and not flink.flink_job_server_jar:
                published = flink.PUBLISHED_FLINK_VERSIONS
                what = f"add --flink-version {theirs}" if theirs in published else f"Beam has one for {published}"
                raise RunnerError(
                    f"Flink at {self._master} is {version}, and the job server would be for {flink.flink_version}: "
                    f"{what}"
                )
        if not flink.flink_submit_uber_jar and not shutil.which(server.job_server_java_launcher):
            raise RunnerError(
                f"the Flink runner starts Beam's job server, which needs {server.job_server_java_launcher!r}, and "
                "that is not on the path. Install a Java runtime, or start the job server elsewhere and name it: "
                "--job-endpoint HOST:8099"
            )

    def check_environment(self) -> None:
        # The address of a pool is resolved at the cluster, so that one that does not answer here is no error.
        portable = self.options.view_as(PortableOptions)
        image = self.options.view_as(WorkerOptions).sdk_container_image
        if (portable.environment_type, portable.environment_config, image) == (None, None, None):
            if self._cluster_is_own:
                return
            raise RunnerError(
                "where do the workers run? Beam would start its own Docker image, which has no af3pipe. Add "
                "--environment-type EXTERNAL --environment-config HOST:PORT for worker pools beside the task "
                f"managers (there: {_POOL}), or --environment-type DOCKER --environment-config IMAGE for an image "
                "with af3pipe, or --environment-type LOOPBACK to have them here"
            )
        if (portable.environment_type or "").upper() != "EXTERNAL":
            return
        host, _, port = (portable.environment_config or "").rpartition(":")
        cluster = f"//{self.job_endpoint}" if self.job_endpoint else FlinkRunner.add_http_scheme(self._master)
        if not port.isdecimal() or (_is_loopback(host) and not _is_loopback(urlsplit(cluster).hostname)):
            return  # the address is one that only the task managers can reach
        try:
            socket.create_connection((host, int(port)), 2).close()
        except OSError as error:
            _log.warning(
                "no worker pool answers at %s:%s from here (%s). If none does from the task managers either, the job "
                "waits for ever: start one beside each, with a PATH on which the first `python` is one that has "
                "af3pipe: %s",
                host,
                port,
                _in_words(error),
                _POOL.replace("50000", port),
            )

    def name_job(self, run_id: str) -> None:
        cloud = self.options.view_as(GoogleCloudOptions)
        cloud.job_name = f"{cloud.job_name or 'af3pipe'}-{run_id.lower()}"

    def cancel_job(self) -> None:
        """Cancels the job by Flink's REST API: cancelling at the job server leaves it running there."""
        name = self.options.view_as(GoogleCloudOptions).job_name
        url = self._rest_url
        if self._cluster_is_own:
            return
        if url is None:
            _log.warning(
                "job %s may go on at the cluster: cancel it there (`flink cancel`, or the web UI). With "
                "--flink-master HOST:8081 af3pipe does that",
                name,
            )
            return
        try:
            jobs = [job for job in _call(f"{url}/jobs/overview")["jobs"] if job["name"] == name]
            for job in jobs:
                if job["end-time"] < 0:
                    _call(f"{url}/jobs/{job['jid']}?mode=cancel", method="PATCH")
                    _log.info("job %s is cancelled at %s", name, url)
            if not jobs:
                _log.warning("%s has no job %s yet: check there whether it is about to start", url, name)
        except (OSError, ValueError, KeyError) as error:
            _log.warning("job %s may go on at the cluster, and has to be cancelled there: %s: %s", name, url, error)


def _flink_version(url: str) -> str:
    # Without a proxy of the environment: the program that will connect is Java, which knows nothing of it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/config", timeout=TIMEOUT_S) as reply:
            return str(json.load(reply)["flink-version"])
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", None) or error
        raise RunnerError(
            f"no Flink cluster answers at {url} ({_in_words(reason)}), which is --flink-master. Start the session "
            "cluster (Flink's bin/start-cluster.sh), or correct the address: that of its REST API and web page, port "
            "8081 unless its rest.port says otherwise"
        ) from error


def _call(url: str, method: str = "GET") -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=_CANCEL_TIMEOUT_S) as answer:
        return json.loads(answer.read() or b"{}")


def _is_loopback(host: str | None) -> bool:
    return host in (None, "localhost", "::1", "[::1]") or str(host).startswith("127.")


def _in_words(error: object) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
