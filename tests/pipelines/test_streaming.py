"""Checks the streaming pipeline before it runs: its graph as a runner sees it, and the errors of a wrong job."""

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PrismRunnerOptions, StandardOptions

from af3pipe.pipelines.graph import build_stream
from af3pipe.pipelines.job import JobError, make_job
from af3pipe.pipelines.streaming import _check_inputs, stream_options
from af3pipe.runners.flink_options import FlinkOptions
from tests import fixtures_audio as make
from tests.fused import fuse

RUN = "20260102T030405Z-abcdef"
GPU = "type:nvidia-l4;count:1;install-nvidia-driver"
ANSWER = "AnswerRecordings/Answer"
FOLDERS = ["gs://archive/a/", "gs://archive/b/*.flac"]
SUBSCRIPTION = "pubsub://projects/p/subscriptions/s"
INPUTS = pytest.mark.parametrize(
    "inputs",
    [
        pytest.param([*FOLDERS, SUBSCRIPTION], id="both"),
        pytest.param(FOLDERS, id="folders", marks=pytest.mark.slow),
        pytest.param([SUBSCRIPTION], id="messages", marks=pytest.mark.slow),
    ],
)


def job_of(**changes):
    values = {"inputs": FOLDERS, "allow_prefixes": ["gs://archive"], "output": "gs://labels", "model": "demo"}
    return make_job(values | changes)


def laid(job, run_id=RUN):
    pipeline = beam.Pipeline()
    build_stream(pipeline, job, run_id)
    return pipeline


def step_names(job, run_id=RUN):
    return {found.unique_name for found in laid(job, run_id).to_runner_api().components.transforms.values()}


@INPUTS
def test_gpu_workers_run_one_step_and_nothing_else(inputs):
    found = fuse(laid(job_of(inputs=inputs, accelerator=GPU)))
    (stage,) = [stage for stage in found.stages if stage.accelerator]
    assert (stage.steps, stage.accelerator) == ((ANSWER,), GPU)


@INPUTS
@pytest.mark.parametrize("changes", [{}, {"accelerator": GPU}, {"resume": False}], ids=str)
def test_no_audio_leaves_its_stage(inputs, changes):
    found = fuse(laid(job_of(inputs=inputs, **changes)))
    assert found.audio_moved == []


@INPUTS
def test_names_are_those_of_another_run_of_the_same_shape(inputs):
    """Else `--update` would lose what is kept in state, and take all for new."""
    others = [name.replace("archive/", "other/").replace("/s/s", "/s/t") for name in inputs]
    one = step_names(job_of(inputs=inputs))
    other = job_of(
        inputs=others,
        allow_prefixes=["gs://other"],
        output="gs://other-labels",
        tasks=["transcript"],
        questions=["Who?", "Where?"],
        accelerator=GPU,
        over_length="split",
        partition_by=["date"],
        watch={"every": "5s", "window": "1h", "pane_every": "10s", "stop_after": "2d", "shards": 7},
    )
    assert one == step_names(other, "20271231T235959Z-ffffff")


@pytest.mark.parametrize("more", [["gs://archive/c/"], ["gs://archive/c/", "gs://archive/d/"]])
def test_names_do_not_change_with_another_folder(more):
    assert step_names(job_of(inputs=FOLDERS)) == step_names(job_of(inputs=[*FOLDERS, *more]))


@INPUTS
def test_names_of_steps_that_keep_state_are_no_accident_of_a_source_file(inputs):
    names = {name for name in step_names(job_of(inputs=inputs)) if "lambda at" in name}
    assert {name for name in names if "/Create/" not in name and "FlatMap(<lambda at core.py" not in name} == set()


# --- stream_options and _check_inputs


def test_prism_is_the_runner_where_none_is_named():
    options = stream_options(job_of(), [])
    assert options.view_as(StandardOptions).runner == "PrismRunner"
    assert options.view_as(StandardOptions).streaming


def test_a_program_on_the_path_is_taken_for_prism_and_one_that_is_named_before_it(tmp_path, monkeypatch):
    program = tmp_path / "prism"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stream_options(job_of(), []).view_as(PrismRunnerOptions).prism_location == str(program)
    named = stream_options(job_of(beam={"prism_location": "/opt/prism"}), [])
    assert named.view_as(PrismRunnerOptions).prism_location == "/opt/prism"
    assert stream_options(job_of(), ["--runner=flink"]).view_as(PrismRunnerOptions).prism_location is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert stream_options(job_of(), []).view_as(PrismRunnerOptions).prism_location is None


@pytest.mark.parametrize("runner", ["flink", "dataflow", "portable"])
def test_other_runners_stream_too(runner):
    options = stream_options(job_of(beam={"runner": runner}), [])
    assert options.view_as(StandardOptions).runner.lower().startswith(runner)
    assert options.view_as(StandardOptions).streaming


@pytest.mark.parametrize("runner", ["flink", "portable"])
def test_bundles_on_flink_end_at_checkpoints_and_its_sources_stay_open(runner):
    found = stream_options(job_of(), [f"--runner={runner}"]).view_as(FlinkOptions)
    assert (found.checkpointing_interval, found.finish_bundle_before_checkpointing) == (10_000, True)
    assert found.shutdown_sources_after_idle_ms is None
    given = stream_options(job_of(), [f"--runner={runner}", "--checkpointing_interval=500"]).view_as(FlinkOptions)
    assert given.checkpointing_interval == 500


def test_other_runners_are_not_told_of_checkpoints():
    assert stream_options(job_of(), []).view_as(FlinkOptions).checkpointing_interval is None


@pytest.mark.parametrize("runner", ["local", "FnApiRunner", "DirectRunner"])
def test_a_runner_that_waits_for_the_end_is_refused(runner):
    with pytest.raises(
        JobError, match=r"writes nothing before its input ends.* leave --runner out, which takes Prism"
    ):
        stream_options(job_of(), [f"--runner={runner}"])


def test_a_folder_that_may_come_is_no_mistake(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.wav").write_bytes(make.wav(make.sound(0.1, 8000), 8000))
    names = [tmp_path / "empty", tmp_path / "soon", tmp_path / "*.wav", tmp_path / "soon" / "*.wav"]
    _check_inputs(job_of(inputs=[*map(str, names)]))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("list.csv", "input list.csv is a manifest or a container; only folders and globs of audio can be watched"),
        ("shards/*.tar", "Process it with `af3pipe run`"),
        ("pubsub://s", "input pubsub://s: subscription is 's'; write projects/PROJECT/subscriptions/NAME"),
        (SUBSCRIPTION, f"input {SUBSCRIPTION}: Pub/Sub does not answer"),
        ("nothing://bucket/a/", "Protocol not known: nothing"),
    ],
)
def test_what_cannot_be_watched_is_told_before_anything_starts(name, says, no_pubsub):
    with pytest.raises(JobError) as error:
        _check_inputs(job_of(inputs=[name]))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
