"""Names of jobs, and what is logged where a job cannot be cancelled at its cluster; test_flink_watch cancels one."""

import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from af3pipe.runners.check import runner_of
from tests.integration.servers import free_port


def named(runner, run_id, *flags):
    options = PipelineOptions([f"--runner={runner}", *flags])
    runner_of(options).name_job(run_id)
    return options.view_as(GoogleCloudOptions).job_name


def test_no_two_jobs_of_a_cluster_have_the_same_name():
    assert named("FlinkRunner", "20260102T030405Z-ABCDEF", "--job_name=nightly") == "nightly-20260102t030405z-abcdef"
    assert named("FlinkRunner", "20260102T030405Z-000000", "--job_name=nightly") == "nightly-20260102t030405z-000000"
    assert named("PortableRunner", "1-a") == "af3pipe-1-a"
    assert named("FnApiRunner", "1-a") is None


CLUSTER = f"--flink_master=localhost:{free_port()}"


@pytest.mark.parametrize(
    ("runner", "flags", "says"),
    [
        ("PortableRunner", ["--job_endpoint=a:1"], "job mine may go on at the cluster: cancel it there"),
        ("PortableRunner", ["--job_endpoint=a:1", CLUSTER], "job mine may go on at the cluster, and has to be"),
        ("FlinkRunner", [CLUSTER], "job mine may go on at the cluster, and has to be cancelled"),
        ("FlinkRunner", [], ""),  # its cluster is part of a job server that ends with this process
        ("DataflowRunner", [], "goes on at Dataflow: cancel it there"),
        ("FnApiRunner", [], ""),
        ("PrismRunner", [], ""),
    ],
)
def test_a_job_that_cannot_be_cancelled_is_logged_with_what_to_do(runner, flags, says, caplog):
    runner_of(PipelineOptions([f"--runner={runner}", "--job_name=mine", *flags])).cancel_job()
    assert says in caplog.text if says else not caplog.records
