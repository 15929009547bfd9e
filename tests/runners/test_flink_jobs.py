"""What is told where a job cannot be ended at its cluster; test_flink_watch ends one."""

import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from af3pipe.runners.flink_jobs import cancel_job, name_job
from tests.integration.servers import free_port


def test_no_two_jobs_have_the_same_name():
    one, another = PipelineOptions(["--job_name=nightly"]), PipelineOptions(["--job_name=nightly"])
    names = name_job(one, "20260102T030405Z-ABCDEF"), name_job(another, "20260102T030405Z-000000")
    assert names == ("nightly-20260102t030405z-abcdef", "nightly-20260102t030405z-000000")
    assert one.view_as(GoogleCloudOptions).job_name == names[0]
    assert name_job(PipelineOptions([]), "1-a") == "af3pipe-1-a"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "job mine may go on at the cluster: cancel it there"),
        ([f"--flink_master=localhost:{free_port()}"], "job mine may go on at the cluster, and has to be cancelled"),
    ],
    ids=["cluster not known", "cluster does not answer"],
)
def test_what_is_left_to_do_is_told(flags, says, caplog):
    cancel_job(PipelineOptions(flags), "mine")
    assert says in caplog.text
