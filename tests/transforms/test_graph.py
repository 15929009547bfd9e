"""What the graph says before it runs: labels, hints, and mistakes found while it is built."""

import apache_beam as beam
import pytest
from apache_beam.pipeline import PipelineVisitor
from apache_beam.transforms.periodicsequence import PeriodicImpulse

from af3pipe.models import EngineOptions, answer, caption, prompt, transcript
from af3pipe.pipelines.graph import build
from af3pipe.pipelines.job import make_job
from af3pipe.schemas import Segment
from af3pipe.transforms import (
    AskAudioFlamingo,
    DecodeAudio,
    ReadRecordings,
    WriteAnswers,
    WriteDeadLetters,
)
from af3pipe.transforms.ask import AskDoFn

HINT = "beam:resources:accelerator:v1"
WRITE = "WriteSettledRecordings/WriteAsSettled"
AT_SILENCE = {"over_length": "split", "split_at": "silence"}


def proto(**changes):
    pipeline = beam.Pipeline()
    values = {"inputs": ["a.wav"], "output": "memory://out", "model": "demo", "tasks": ["caption"]}
    build(pipeline, make_job(values | changes), "run")
    return pipeline.to_runner_api()


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
            fn = getattr(getattr(node.transform, "fn", None), "_dofn", None)
            found.extend([fn] if isinstance(fn, AskDoFn) else [])

    pipeline.visit(Asking())
    (dofn,) = found
    assert dofn._options == EngineOptions(**told)
    assert (dofn._question_tokens, dofn._question_think) == (9, True)


def transforms(found):
    (root,) = found.root_transform_ids
    return {item.unique_name: item for key, item in found.components.transforms.items() if key != root}


def test_labels_read_as_the_job():
    top = {name for name in transforms(proto()) if name.partition("/")[0] == name}
    assert top == {
        "CheckWorkers",
        "ReadRecordings",
        "ResumeRecordings",
        "JoinRejected",
        "SettleSkipped",
        "NotAsked",
        "NotAskedNotWritten",
        "WriteNotAsked",
        "NotWritten",
        "AnswerAndSettle",
        "WriteSettledRecordings",
        "CountFound",
    }
    assert {"AnswerAndSettle/Decode", "AnswerAndSettle/Ask"} < transforms(proto()).keys()


def test_decoding_to_writing_share_one_environment_with_the_accelerator():
    found = proto(accelerator="type:nvidia-l4;count:1;install-nvidia-driver")
    named = transforms(found)
    ids = {
        named[name].environment_id
        for name in ("NotWritten/NotWritten", "AnswerAndSettle/Decode", "AnswerAndSettle/Ask", WRITE)
    }
    assert len(ids) == 1
    hints = found.components.environments[ids.pop()].resource_hints
    assert hints[HINT] == b"type:nvidia-l4;count:1;install-nvidia-driver"
    listing = named["ReadRecordings/List"].environment_id
    assert HINT not in found.components.environments[listing].resource_hints


@pytest.mark.parametrize("verify_sample", [0, 5])
def test_segments_go_from_decoding_to_asking_and_nowhere_else(verify_sample):
    leaves = {
        name: found
        for name, found in transforms(proto(verify_sample=verify_sample)).items()
        if not found.subtransforms
    }
    segments = set(leaves["AnswerAndSettle/Decode"].outputs.values())
    takers = [name for name, found in leaves.items() if segments & set(found.inputs.values())]
    assert takers == ["AnswerAndSettle/Ask"]


def test_verifying_adds_steps_only_where_it_is_asked_for():
    plain, verifying = transforms(proto(verify_sample=0)), transforms(proto(verify_sample=5))
    added = verifying.keys() - plain.keys()
    outputs = {"AnswerAndSettle/Settle/ParDo(_GatherDoFn)"}  # Beam's own, of a step with several
    assert {name.partition("/")[0] for name in added - outputs} == {"VerifyAnswers", "WriteVerified"}
    assert plain.keys() < verifying.keys()
    settle = "AnswerAndSettle/Settle"
    assert len(plain[settle].outputs) == 1
    assert len(verifying[settle].outputs) == 2


def test_verifying_asks_where_the_model_is():
    named = transforms(proto(verify_sample=5, accelerator="type:nvidia-l4;count:1;install-nvidia-driver"))
    places = {"AnswerAndSettle/Ask", "VerifyAnswers/AskAlone"}
    assert len({named[name].environment_id for name in places}) == 1
    for name in ("VerifyAnswers/Sample", "VerifyAnswers/Total", "WriteVerified"):  # text, and numbers
        assert named[name].environment_id != named["VerifyAnswers/AskAlone"].environment_id


def test_the_sketch_of_the_readme_builds():
    pipeline = beam.Pipeline()
    answers = (
        pipeline
        | ReadRecordings("s3://archive/**/*.flac")
        | DecodeAudio(over_length="split")
        | AskAudioFlamingo(model="nvidia/audio-flamingo-3-hf", tasks=[caption(), transcript()])
    )
    _ = answers.good | WriteAnswers("s3://out")
    _ = answers.dead_letters | WriteDeadLetters("s3://out")
    assert pipeline.to_runner_api().components.transforms


def test_segments_are_typed_for_the_next_transform():
    pipeline = beam.Pipeline()
    segments = pipeline | ReadRecordings("a.wav") | DecodeAudio(model="demo")
    assert segments.good.element_type is Segment


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
        (lambda: beam.Pipeline() | PeriodicImpulse() | WriteAnswers("out"), "WriteAnswers writes bounded"),
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
        "a stream",
    ],
)
def test_mistakes_are_found_while_the_graph_is_built(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_questions_of_the_same_task_are_no_mistake():
    AskAudioFlamingo(tasks=[prompt("mood", "What mood?"), prompt("genre", "What genre?")])
