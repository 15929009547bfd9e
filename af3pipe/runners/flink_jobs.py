"""Ending a job at a Flink cluster: one that Beam's job server is told to cancel runs on there."""

import json
import logging
import urllib.request
from typing import Any

from apache_beam.options.pipeline_options import FlinkRunnerOptions, GoogleCloudOptions, PipelineOptions
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES, FlinkRunner

MAY_BE_FLINK = ("FlinkRunner", "PortableRunner")
"""Runners of which Beam cannot tell whether a Flink cluster is behind them."""
_TIMEOUT_S = 10
_log = logging.getLogger(__name__)


def name_job(options: PipelineOptions, run_id: str) -> str:
    """Gives the job a name that no other one has at the cluster."""
    cloud = options.view_as(GoogleCloudOptions)
    name = f"{cloud.job_name or 'af3pipe'}-{run_id.lower()}"
    cloud.job_name = name
    return name


def cancel_job(options: PipelineOptions, name: str) -> None:
    """Cancels a job at the cluster, by Flink's REST API; where that cannot be done, logs what is left to do."""
    master = options.view_as(FlinkRunnerOptions).flink_master.strip()
    if master in MAGIC_HOST_NAMES:
        _log.warning(
            "job %s may go on at the cluster: cancel it there (`flink cancel`, or the web UI). With --flink-master "
            "HOST:8081 this is done for you",
            name,
        )
        return
    address = FlinkRunner.add_http_scheme(master).rstrip("/")
    try:
        jobs = [job for job in _call(f"{address}/jobs/overview")["jobs"] if job["name"] == name]
        for job in jobs:
            if job["end-time"] < 0:
                _call(f"{address}/jobs/{job['jid']}?mode=cancel", method="PATCH")
        if not jobs:
            _log.warning("%s has no job %s yet: look again, whether it is about to start", address, name)
    except (OSError, ValueError, KeyError) as error:
        _log.warning("job %s may go on at the cluster, and has to be cancelled there: %s: %s", name, address, error)


def _call(url: str, method: str = "GET") -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=_TIMEOUT_S) as answer:
        return json.loads(answer.read() or b"{}")
