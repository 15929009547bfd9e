"""A job that is submitted and left: as a Flex Template's launcher does it, and as any runner takes it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from af3pipe.cli import app
from af3pipe.pipelines.batch import RunFailed
from af3pipe.pipelines.handover import found_uri
from af3pipe.pipelines.job import JobError, make_job
from af3pipe.pipelines.submit import finish, submit
from af3pipe.runners.local import Local
from af3pipe.tables.run_record import record_uri, unfinished_runs
from tests.integration.servers import store_server, using

pytestmark = pytest.mark.integration

MAIN = Path(__file__).parents[2] / "deploy" / "dataflow" / "main.py"
HINT = "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"


def write_tones(folder, number):
    for index in range(number):
        tone = 0.3 * np.sin(2 * np.pi * (300 + 40 * index) / 16000 * np.arange(16000))
        soundfile.write(folder / f"{index}.wav", tone, 16000)


@pytest.fixture(scope="module")
def gcs(tmp_path_factory):
    with store_server("fake-gcs-server", tmp_path_factory.mktemp("gcs")) as store, using(store):
        yield store


def launch(store, *flags):
    """The launcher, as the template's image runs it: `--template_location` has it leave the job in a file."""
    given = [
        "--runner=DataflowRunner",
        "--project=some-project",
        "--region=us-central1",
        "--job_name=nightly",
        "--staging_location=gs://labels/staging",
        "--temp_location=gs://labels/tmp",
        "--template_location=gs://labels/launches/1/job_object",
        "--sdk_container_image=us-docker.pkg.dev/some-project/af3pipe/worker:1",
        "--no_auth",
    ]
    emulator = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{store.port}"}
    command = [sys.executable, str(MAIN), *given, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | emulator)


@pytest.mark.slow
def test_the_launcher_leaves_a_job(gcs, tmp_path):
    write_tones(tmp_path, 1)
    gcs.fs.put(str(tmp_path / "0.wav"), "archive/0.wav")
    done = launch(
        gcs,
        "--inputs=gs://archive/",
        "--output=gs://labels/out",
        "--model=demo",
        "--tasks=[caption, transcript]",
        f"--accelerator={HINT}",
        "--number_of_worker_harness_threads=4",
    )
    assert done.returncode == 0, done.stderr
    job = json.loads(gcs.fs.cat("labels/launches/1/job_object"))
    assert (job["name"], job["type"]) == ("nightly", "JOB_TYPE_BATCH")
    assert "no_use_multiple_sdk_containers" in job["environment"]["experiments"]
    (pool,) = job["environment"]["workerPools"]
    images = [found["containerImage"] for found in pool["sdkHarnessContainerImages"]]
    assert images == ["us-docker.pkg.dev/some-project/af3pipe/worker:1"] * 2  # with and without the hint
    assert pool["numThreadsPerWorker"] == 4
    staged = gcs.fs.find("labels/staging")
    assert any(name.endswith("pipeline.pb") for name in staged)
    assert not any("apache_beam" in name or name.endswith(".tar.gz") for name in staged)  # it is in the image
    (started,) = unfinished_runs("gs://labels/out")
    assert started["run_id"] in done.stderr


@pytest.mark.slow
def test_the_launcher_says_what_is_wrong(gcs):
    done = launch(gcs, "--inputs=gs://archive/none/*.wav", "--output=gs://labels/none", "--model=demo")
    assert done.returncode == 1
    assert "error: no input matched: gs://archive/none/*.wav" in done.stderr
    assert "Traceback" not in done.stderr


def finish_when_it_is_done(output, run_id, seconds=240):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return finish(output, run_id)
        except RunFailed:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


@pytest.fixture
def values(tmp_path):
    """Of a job with three recordings and a broken one."""
    (tmp_path / "in").mkdir()
    write_tones(tmp_path / "in", 3)
    (tmp_path / "in" / "broken.wav").write_bytes(b"no audio")
    return {"inputs": [str(tmp_path / "in")], "output": str(tmp_path / "out"), "model": "demo", "verify_sample": 1}


@pytest.mark.slow
def test_a_job_that_was_left_is_counted_when_it_is_done(values, job_service):
    run_id = submit(make_job(values | {"device": "cpu"}), job_service)
    with pytest.raises(RunFailed, match=f"run {run_id} (is still running|is not complete yet)"):
        finish(values["output"], run_id)
    _, report = finish_when_it_is_done(values["output"], run_id)
    look_at_finished(values["output"], report, "PortableRunner")


def test_what_a_job_that_was_left_wrote_is_counted_once_it_is_all_there(values, engines, monkeypatch):
    """As above, but for the runner: the one of this process waits for the job's end, so part of it is taken away."""
    monkeypatch.setattr(Local, "is_in_process", False)
    output = values["output"]
    run_id = submit(make_job(values | {"engine": "constant", "decode_guard": False}))
    (started,) = unfinished_runs(output)
    assert started["run_id"] == run_id
    for part in (found_uri(output, run_id), *map(str, Path(output, "recordings").iterdir())):
        Path(part).rename(f"{part}.away")
        with pytest.raises(RunFailed, match=f"run {run_id} (is still running|is not complete yet)"):
            finish(output, run_id)
        Path(f"{part}.away").rename(part)
    _, report = finish(output, run_id)
    look_at_finished(output, report, "FnApiRunner")


def look_at_finished(output, report, runner):
    run_id = report.run_id
    assert report.counts.states == {"ok": 3, "dead_letter": 1}
    record = json.loads(Path(record_uri(output, run_id)).read_text())
    assert (record["runner"], record["reconciled"], record["recordings_found"]) == (runner, True, 4)
    assert report.verified.requests == 1
    assert list(unfinished_runs(output)) == []
    assert [path.name for path in Path(output, "_runs").iterdir()] == [f"{run_id}.json"]
    with pytest.raises(JobError, match=f"has no unfinished run {run_id}"):
        finish(output, run_id)
    told = CliRunner().invoke(app, ["finish", output, run_id])
    assert told.exit_code == 2
    assert f"has no unfinished run {run_id}" in told.output


def test_a_job_is_not_left_with_a_runner_that_ends_with_the_program(tmp_path):
    job = make_job({"inputs": ["a.wav"], "output": str(tmp_path)})
    with pytest.raises(JobError, match="runner is 'FnApiRunner', which ends with this program"):
        submit(job)
