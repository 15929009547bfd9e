"""The job for Dataflow, built and translated by its own runner, and not sent (`--dry_run`).

It is compared with a committed description. To renew that after an intended change:

    AF3PIPE_RENEW=1 python -m pytest tests/pipelines/test_dataflow.py -k committed
"""

import difflib
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.coders import BooleanCoder
from apache_beam.pipeline import PipelineVisitor
from apache_beam.transforms.periodicsequence import PeriodicImpulse
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec
from apache_beam.transforms.window import FixedWindows
from google.protobuf.json_format import MessageToDict

from af3pipe.pipelines.beam_flags import beam_options
from af3pipe.pipelines.graph import build, build_stream
from af3pipe.pipelines.job import make_job
from af3pipe.pipelines.job_file import load_job_values
from af3pipe.schemas import Recording, Segment
from af3pipe.transforms import AskAudioFlamingo, DecodeAudio
from af3pipe.transforms.decode import _DecodeDoFn
from tests.fused import fuse

JOB_FILE = Path(__file__).parents[2] / "deploy" / "dataflow" / "job.yaml"
COMMITTED = Path(__file__).with_name("dataflow_job.json")
NO_PIP_FREEZE = "--experiments=disable_logging_submission_environment"
RENEW = "AF3PIPE_RENEW=1 python -m pytest tests/pipelines/test_dataflow.py -k committed"
GPU = "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"
STREAMED = {"inputs": ["gs://my-archive/2026/", "gs://my-other-archive/*.flac"]}
ANSWER = "AnswerRecordings/Answer"
ON_THE_GPU = ("NotWritten/NotWritten", ANSWER, "WriteRows/WriteAsTheyCome")
DECODE = "DecodeAudio/Decode/ParDo(_DecodeDoFn)"


def job_of(**changes):
    return make_job(load_job_values(str(JOB_FILE)) | {"model": "demo"} | changes)


def dry_run(job, run_id="20261121T000000Z-000000", lay=build):
    """The pipeline as Dataflow's runner has made it, and what it would send."""
    pipeline = beam.Pipeline(options=beam_options(job, ["--dry_run=True", NO_PIP_FREEZE]))
    lay(pipeline, job, run_id)
    return pipeline, pipeline.run().job


def fused(job, lay=build):
    pipeline, _ = dry_run(job, lay=lay)
    return fuse(pipeline, pipeline.runner.proto_pipeline, pipeline.runner.proto_context)


def step_names(job, run_id, lay=build):
    _, sent = dry_run(job, run_id, lay)
    return {found.unique_name for found in sent.proto_pipeline.components.transforms.values()}


def test_gpu_workers_run_one_stage_from_decoding_to_writing_and_nothing_else():
    found = fused(job_of())
    assert {stage.accelerator for stage in found.stages} == {"", GPU}
    assert [stage.steps for stage in found.stages if stage.accelerator] == [ON_THE_GPU]


def test_verifying_takes_one_more_step_on_the_gpu():
    found = fused(job_of(verify_sample=5))
    (asking, alone) = sorted((stage.steps for stage in found.stages if stage.accelerator), key=len, reverse=True)
    assert {step.partition("/ParDo")[0] for step in asking} == set(ON_THE_GPU)
    assert alone == ("VerifyAnswers/AskAlone",)


def test_workers_of_one_kind_have_decoding_to_writing_in_one_stage():
    found = fused(job_of(accelerator=None))
    assert set(ON_THE_GPU) <= set(found.stage_of(ANSWER).steps)
    assert {stage.accelerator for stage in found.stages} == {""}


@pytest.mark.parametrize("changes", [{}, {"accelerator": None}, {"verify_sample": 5}, {"resume": False}], ids=str)
def test_no_audio_leaves_its_stage(changes):
    found = fused(job_of(**changes))
    assert found.audio_moved == []
    assert len(found.moved) > 20  # rows of text, of which there are many


class Spread(DecodeAudio):
    """Decodes, and then does what must not be done."""

    def expand(self, inputs):
        decoded = super().expand(inputs)
        return decoded._replace(good=decoded.good | "Spread" >> beam.Reshuffle())


def _keyed(segment):
    return segment.recording.recording_id, segment


class Grouped(DecodeAudio):
    """Groups segments by a step that says nothing of what it gives."""

    def expand(self, inputs):
        decoded = super().expand(inputs)
        good = (
            decoded.good
            | "Key" >> beam.Map(_keyed).with_output_types(tuple[str, Any])
            | "Group" >> beam.GroupByKey()
            | "Each" >> beam.FlatMap(lambda group: group[1]).with_output_types(Segment)
        )
        return decoded._replace(good=good)


class _Seen(beam.DoFn):
    SEEN = beam.DoFn.StateParam(ReadModifyWriteStateSpec("seen", BooleanCoder()))

    def process(self, keyed, seen=SEEN):
        seen.write(True)
        yield keyed[1]


class Remembered(DecodeAudio):
    """Keeps state by recording behind decoding, as a stream might."""

    def expand(self, inputs):
        decoded = super().expand(inputs)
        keyed = decoded.good | "Key" >> beam.Map(_keyed).with_output_types(tuple[str, Any])
        return decoded._replace(good=keyed | "Seen" >> beam.ParDo(_Seen()).with_output_types(Segment))


@pytest.mark.parametrize(
    ("decode", "accelerator", "moved"),
    [
        (DecodeAudio, None, set()),
        (Spread, None, {"DecodeAudio/Spread", DECODE}),
        (Grouped, None, {"DecodeAudio/Key", "DecodeAudio/Group"}),
        (Remembered, None, {"DecodeAudio/Key"}),
        (DecodeAudio, GPU, {DECODE}),  # which is where there is no GPU
    ],
)
def test_audio_that_leaves_its_stage_is_seen(decode, accelerator, moved):
    pipeline = beam.Pipeline()
    ticks = pipeline | PeriodicImpulse() | beam.WindowInto(FixedWindows(60))  # bounded or not is the same
    recordings = ticks | beam.Map(lambda tick: Recording("a", "a.wav")).with_output_types(Recording)
    ask = AskAudioFlamingo(model="demo", tasks=job_of().all_tasks())
    if accelerator:
        ask = ask.with_resource_hints(accelerator=accelerator)
    _ = recordings | "DecodeAudio" >> decode(model="demo") | "AskAudioFlamingo" >> ask
    found = fuse(pipeline)
    assert {one.made_by for one in found.moved if one.may_hold_audio} == moved
    assert all("in another stage" in text for text in found.audio_moved)


@pytest.mark.parametrize("lay", [build, pytest.param(build_stream, marks=pytest.mark.slow)])
def test_names_are_those_of_another_run_over_other_recordings(lay):
    one = job_of()
    other = job_of(
        inputs=["gs://other/a.wav", "gs://other/b/"],
        output="gs://other-labels/x",
        tasks=[{"name": "mood", "prompt": "What mood is it?"}],
        questions=["Who speaks?", "Where?"],
    )
    names = step_names(one, "20261121T000000Z-000000", lay)
    assert names == step_names(other, "20271231T235959Z-ffffff", lay)


def test_a_stream_answers_in_one_stage_and_moves_no_audio():
    found = fused(job_of(**STREAMED), build_stream)
    assert [stage.steps for stage in found.stages if stage.accelerator] == [(ANSWER,)]
    assert found.audio_moved == []


class Untyped(beam.PTransform):
    """Decodes, and shuffles what comes of it; nothing has a type."""

    def __init__(self, decode):
        super().__init__()
        self._decode = decode

    def expand(self, recordings):
        decode = _DecodeDoFn(self._decode.decoder)
        return recordings | "Decode" >> beam.ParDo(decode) | "Spread" >> beam.Reshuffle() | beam.Map(print)


def test_audio_without_a_type_is_seen_too():
    pipeline = beam.Pipeline()
    recordings = pipeline | beam.Create([Recording("a", "a.wav")]).with_output_types(Recording)
    _ = recordings | "Untyped" >> Untyped(DecodeAudio(model="demo"))
    assert {one.made_by for one in fuse(pipeline).moved if one.may_hold_audio} == {
        "Untyped/Decode",
        "Untyped/Spread",
    }


@pytest.mark.parametrize("lay", [build, pytest.param(build_stream, marks=pytest.mark.slow)])
def test_names_are_given_and_no_accident_of_a_source_file(lay):
    """A line number in a name makes another step of it with Beam's next version, which `--update` refuses."""
    job = job_of() if lay is build else job_of(**STREAMED)
    ours = {name for name in step_names(job, "20261121T000000Z-000000", lay) if "lambda" in name}
    # Of Beam's own Create, which keeps nothing that an update would have to find again.
    assert {name for name in ours if not re.fullmatch(r".*/FlatMap\(<lambda at core\.py:\d+>\)", name)} == set()


def described():
    """What is sent, without what differs from one machine, run or version of Beam to the next."""
    from apache_beam.runners.dataflow.internal.apiclient import Environment

    pipeline, sent = dry_run(job_of())
    environment = Environment([], sent.options, "8", "", proto_pipeline=sent.proto_pipeline).proto
    told = MessageToDict(environment._pb)
    pool = told["workerPools"][0]
    hints = {
        key: {name.split(":")[2]: bytes(value).decode() for name, value in found.resource_hints.items()}
        for key, found in sent.proto_pipeline.components.environments.items()
    }
    images = sorted(
        ({"containerImage": found["containerImage"], "hints": hints[found["environmentId"]]}
         for found in pool["sdkHarnessContainerImages"]),
        key=str,
    )  # fmt: skip
    settings = ("machineType", "diskSizeGb", "numThreadsPerWorker", "autoscalingSettings")
    return {
        "type": sent.proto.type_.name,
        "experiments": [name for name in told["experiments"] if "sdk_containers" in name],  # the rest is Beam's own
        "workers": {name: pool[name] for name in settings} | {"sdkHarnessContainerImages": images},
        "steps": _steps(pipeline, sent.proto_pipeline.components, hints),
    }


def _steps(pipeline, components, hints):
    """The steps as they are laid; what Beam makes its own of is one."""
    outermost = _Outermost()
    pipeline.visit(outermost)

    def step_of(name):
        return next((step for step in outermost.kinds if f"{name}/".startswith(f"{step}/")), None)

    leaves = [found for found in components.transforms.values() if not found.subtransforms]
    made_by, takes, accelerators = {}, defaultdict(set), defaultdict(set)
    for found in leaves:
        for tag, key in found.outputs.items():
            made_by[key] = step_of(found.unique_name), "" if tag == "None" else f"[{tag}]"
        accelerators[step_of(found.unique_name)] |= {hints.get(found.environment_id, {}).get("accelerator")} - {None}
    for found in leaves:
        for key in found.inputs.values():
            maker, tag = made_by[key]
            if maker != step_of(found.unique_name):
                takes[step_of(found.unique_name)].add(maker + tag)
    return {
        name: {"does": kind, "takes": sorted(takes[name])}
        | ({"accelerator": sorted(accelerators[name])} if accelerators[name] else {})
        for name, kind in outermost.kinds.items()
    }


class _Outermost(PipelineVisitor):
    """Names of the outermost transforms that are Beam's own, and what they are."""

    def __init__(self):
        self.kinds = {}

    def enter_composite_transform(self, node):
        self.visit_transform(node)

    def visit_transform(self, node):
        if node.transform is None or type(node.transform).__module__.startswith("af3pipe"):
            return
        if not any(node.full_label.startswith(f"{name}/") for name in self.kinds):
            self.kinds[node.full_label] = type(node.transform).__name__.strip("_").replace("MultiParDo", "ParDo")


def test_the_job_is_the_one_that_is_committed():
    found = json.dumps(described(), indent=1) + "\n"
    if os.environ.get("AF3PIPE_RENEW"):
        COMMITTED.write_text(found, encoding="utf-8")
    committed = COMMITTED.read_text(encoding="utf-8")
    difference = "".join(difflib.unified_diff(committed.splitlines(True), found.splitlines(True), "committed", "now"))
    assert found == committed, f"the job for Dataflow is another one; if that is meant: {RENEW}\n{difference}"
