"""What the graph says before it runs: labels, hints, and mistakes found while it is built."""

import apache_beam as beam
import pytest
from apache_beam.pipeline import PipelineVisitor

from af3pipe.models import EngineOptions, answer, caption, prompt, transcript
from af3pipe.pipelines.graph import build
from af3pipe.pipelines.job import make_job
from af3pipe.schemas import AudioObject, RecordingResult, Segment
from af3pipe.transforms import (
    AnswerRecordings,
    Answers,
    AskAudioFlamingo,
    DeadLetters,
    DecodeAudio,
    ReadRecordings,
    Rows,
    WriteResults,
)
from af3pipe.transforms.answer import AnswerDoFn
from tests.fused import fuse

HINT = "beam:resources:accelerator:v1"
GPU = "type:nvidia-l4;count:1;install-nvidia-driver"
ANSWER = "AnswerRecordings/Answer"
WRITE = "WriteRows/WriteAsTheyCome"
AT_SILENCE = {"over_length": "split", "split_at": "silence"}


def laid(**changes):
    pipeline = beam.Pipeline()
    values = {"inputs": ["a.wav"], "output": "memory://out", "model": "demo", "tasks": ["caption"]}
    build(pipeline, make_job(values | changes), "run")
    return pipeline


def proto(**changes):
    return laid(**changes).to_runner_api()


def test_the_engine_is_opened_as_the_job_says():
    told = {
        "model": "demo",
        "dtype": "float16",
        "device": "cuda:1",
        "slots": 3,
        "queue_audio_s": 60.0,
        "attention": "eager",
        "cuda_graphs": False,
        "adapter": "/models/think",
        "quantize": "int8",
    }
    values = {"inputs": ["a.wav"], "output": "memory://out", "tasks": ["caption"], "think": True, "max_new_tokens": 9}
    pipeline = beam.Pipeline()
    build(pipeline, make_job(values | told), "run")
    found = []

    class Asking(PipelineVisitor):
        def visit_transform(self, node):
            fn = getattr(node.transform, "fn", None)
            found.extend([fn] if isinstance(fn, AnswerDoFn) else [])

    pipeline.visit(Asking())
    (dofn,) = found
    asker = dofn._asker
    assert asker.options == EngineOptions(**told)
    assert (asker._question_tokens, asker._question_think, asker._keep_engine) == (9, True, True)


def transforms(found):
    (root,) = found.root_transform_ids
    return {item.unique_name: item for key, item in found.components.transforms.items() if key != root}


def test_labels_read_as_the_job():
    top = {name for name in transforms(proto()) if name.partition("/")[0] == name}
    assert top == {
        "CheckWorkers",
        "ListRecordings",
        "ReadExisting",
        "PlanObjects",
        "CountFound",
        "NotWritten",
        "AnswerRecordings",
        "WriteRows",
    }


@pytest.mark.parametrize("verify_sample", [0, 5])
def test_from_the_objects_to_their_rows_is_one_stage(verify_sample):
    fused = fuse(laid(accelerator=GPU, verify_sample=verify_sample))
    stage = fused.stage_of("AnswerRecordings")
    assert stage == fused.stage_of("NotWritten") == fused.stage_of("WriteRows")
    assert stage.accelerator == GPU
    assert fused.stage_of("ListRecordings/List").accelerator == ""
    assert fused.audio_moved == []


def test_decoding_to_writing_share_one_environment_with_the_accelerator():
    found = proto(accelerator=GPU)
    named = transforms(found)
    ids = {named[name].environment_id for name in ("NotWritten/NotWritten", ANSWER, WRITE)}
    assert len(ids) == 1
    hints = found.components.environments[ids.pop()].resource_hints
    assert hints[HINT] == GPU.encode()
    listing = named["ListRecordings/List"].environment_id
    assert HINT not in found.components.environments[listing].resource_hints


def test_what_is_answered_crosses_a_shuffle_as_an_object_and_no_segment_is_in_the_graph():
    pipeline = laid()
    proto, context = pipeline.to_runner_api(return_context=True)
    types = {key: context.pcollections.get_by_id(key).element_type for key in proto.components.pcollections}
    assert Segment not in types.values()
    named = {item.unique_name: item for item in proto.components.transforms.values()}
    (taken,), (given,) = named[ANSWER].inputs.values(), named[ANSWER].outputs.values()
    assert (types[taken], types[given]) == (AudioObject, RecordingResult)


def test_verifying_adds_steps_only_where_it_is_asked_for():
    plain, verifying = transforms(proto(verify_sample=0)), transforms(proto(verify_sample=5))
    added = verifying.keys() - plain.keys()
    outputs = {f"{ANSWER}/ParDo(AnswerDoFn)"}  # Beam's own, of a step with several
    assert {name.partition("/")[0] for name in added - outputs} == {"VerifyAnswers", "WriteVerified"}
    assert plain.keys() < verifying.keys()
    assert len(plain[ANSWER].outputs) == 1
    assert len(verifying[ANSWER].outputs) == 2


def test_verifying_asks_where_the_model_is():
    named = transforms(proto(verify_sample=5, accelerator=GPU))
    alone = named["VerifyAnswers/AskAlone"].environment_id
    assert alone in {item.environment_id for name, item in named.items() if name.startswith(ANSWER)}
    for name in ("VerifyAnswers/Sample", "VerifyAnswers/Total", "WriteVerified"):  # text, and numbers
        assert named[name].environment_id != alone


@pytest.mark.parametrize("resume", [True, False])
def test_earlier_runs_are_read_where_the_job_resumes_them(resume):
    names = transforms(proto(resume=resume))
    assert ("ReadExisting/Rows" in names) == resume


def test_the_sketch_of_the_readme_builds():
    pipeline = beam.Pipeline()
    results = (
        pipeline
        | ReadRecordings("s3://archive/**/*.flac")
        | AnswerRecordings(
            model="nvidia/audio-flamingo-3-hf", tasks=[caption(), transcript()], over_length="split", accelerator=GPU
        )
    )
    assert results.element_type is RecordingResult
    _ = results | WriteResults("s3://out")
    for rows in (Answers(), DeadLetters(), Rows()):
        _ = results | rows
    fused = fuse(pipeline)
    stage = fused.stage_of("AnswerRecordings")
    assert stage.accelerator == GPU
    assert fused.audio_moved == []


def test_segments_are_for_a_pipeline_of_ones_own():
    pipeline = beam.Pipeline()
    segments = pipeline | ReadRecordings("a.wav") | DecodeAudio(model="demo")
    assert segments.good.element_type is Segment
    answers = segments | AskAudioFlamingo(model="demo", tasks=[caption()])
    assert fuse(pipeline).stage_of("DecodeAudio") == fuse(pipeline).stage_of("AskAudioFlamingo/Ask")
    assert fuse(pipeline).audio_moved == []
    assert answers.dead_letters is not None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DecodeAudio(over_length="cut"), "over_length is 'cut'; it must be one of dead-letter"),
        (lambda: DecodeAudio(split_at="pause"), "split_at is 'pause'; it must be one of cap, silence"),
        (lambda: DecodeAudio(split_at="silence"), "split_at is 'silence', but over_length is 'dead-letter'"),
        (lambda: DecodeAudio(over_length="split", split_tolerance_s=9), "tolerance_s is 9, but split_at is 'cap'"),
        (lambda: DecodeAudio(**AT_SILENCE, split_tolerance_s=0), "split_tolerance_s is 0; it must be more than 0"),
        (lambda: DecodeAudio(on_silent="drop"), "on_silent is 'drop'; it must be one of flag, dead-letter"),
        (lambda: DecodeAudio(silent_below_dbfs=60), "silent_below_dbfs is 60; it must be from -120 to below 0"),
        (lambda: AskAudioFlamingo(tasks=[]), "tasks is empty"),
        (lambda: AskAudioFlamingo(tasks=[caption(), caption()]), "task 'caption' is asked twice"),
        (lambda: AskAudioFlamingo(tasks=[answer("Who?"), answer("Who?")]), "question 'Who\\?' is asked twice"),
        (lambda: beam.Pipeline() | ReadRecordings([]), "inputs is empty"),
        (lambda: WriteResults("out", run_id="a/b"), "run_id is 'a/b'; it must be"),
        (lambda: WriteResults("out", partition_by=["task"]), "partition_by names 'task', which is a column"),
    ],
    ids=[
        "over_length",
        "split_at",
        "no split",
        "no silence",
        "tolerance",
        "on_silent",
        "loud",
        "no task",
        "task twice",
        "question twice",
        "no input",
        "run_id",
        "partition",
    ],
)
def test_mistakes_are_found_while_the_graph_is_built(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_questions_of_the_same_task_are_no_mistake():
    AskAudioFlamingo(tasks=[prompt("mood", "What mood?"), prompt("genre", "What genre?")])
