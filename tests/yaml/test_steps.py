"""What a pipeline in YAML is told where it is built: nothing here runs."""

import re
from pathlib import Path
from typing import Optional

import apache_beam as beam
import pytest
import yaml

from af3pipe.pipelines.job import JobConfig
from af3pipe.schemas import Answer, DeadLetter, Recording, RecordingRow
from af3pipe.yaml import PROVIDERS, __all__, steps
from af3pipe.yaml.rows import row_type

pytest.importorskip("quickjs", reason="Beam YAML is not installed: pip install 'af3pipe[yaml]'")
from apache_beam.yaml import main

DOC = (Path(__file__).parents[2] / "docs" / "yaml.md").read_text(encoding="utf-8")
PIPELINE, GPU_STEP = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL))


def build(*transforms):
    text = yaml.safe_dump({"pipeline": {"transforms": list(transforms)}, "providers": [{"include": PROVIDERS}]})
    _, construct = main.build_pipeline_components_from_yaml(text, [])
    pipeline = beam.Pipeline()
    construct(pipeline)
    return pipeline


def step(name, input_=None, **config):
    found = {"type": name, "config": config}
    return found | ({"input": input_} if input_ else {})


READ = step("ReadRecordings", inputs=["archive/"])
DECODE = step("DecodeAudio", "ReadRecordings", model="demo")
ASK = step("AskAudioFlamingo", "DecodeAudio", model="demo")
ACCOUNTS = {"recordings": "ReadRecordings", "answers": "Filter", "dead_letters": "ReadRecordings"}
RECONCILE = step("ReconcileRecordings", ACCOUNTS)


@pytest.mark.parametrize(
    ("transforms", "told"),
    [
        ([step("ReadRecordings")], "config: inputs is missing"),
        ([step("ReadRecordings", inputs=[])], "config: inputs is missing; name a file"),
        ([step("ReadRecordings", input="a")], "input is not a key of ReadRecordings; did you mean 'inputs'"),
        ([step("ReadRecordings", inputs="a", model="demo")], "model is not a key of ReadRecordings; it is one of D"),
        ([step("ReadRecordings", inputs="a", runs=1)], "runs is not a key of ReadRecordings; allowed are inputs, ch"),
        ([step("ReadRecordings", inputs="a", channel="up")], "config: channel is 'up'; it must be mix, left, right"),
        (
            [READ, step("DecodeAudio", "ReadRecordings", over_length="cut")],
            "over_length is 'cut': input should be 'd",
        ),
        (
            [READ, step("DecodeAudio", "ReadRecordings", split_at="silence")],
            "DecodeAudio.* split_at is 'silence'.*over_length",
        ),
        (
            [READ, DECODE, step("AskAudioFlamingo", "DecodeAudio", tasks=["sing"])],
            "tasks.0: task 'sing' is not known",
        ),
        (
            [READ, DECODE, step("AskAudioFlamingo", "DecodeAudio", tasks=[{"name": "mood", "promt": "?"}])],
            "tasks.0.promt is not a key of a job; did you mean 'prompt'",
        ),
        ([READ, DECODE, step("AskAudioFlamingo", "DecodeAudio", engine="vl")], "engine is 'vl', which is not known"),
        ([READ, DECODE, ASK, step("WriteAnswers", "AskAudioFlamingo")], "config: output is missing"),
        (
            [READ, DECODE, ASK, step("WriteAnswers", "AskAudioFlamingo", output="")],
            "output is '': string should have",
        ),
        (
            [READ, DECODE, ASK, step("WriteAnswers", "AskAudioFlamingo", output="o", partition_by=["task"])],
            "partition_by names 'task', which is a column",
        ),
        (
            [READ, DECODE, ASK, step("WriteAnswers", "AskAudioFlamingo", output="o", run_id=7)],
            "run_id is 7; it must be text",
        ),
        (
            [READ, DECODE, ASK, step("WriteRecordings", "AskAudioFlamingo", output="o")],
            "WriteRecordings.*its input has no column terminal_state, .* as rows of RecordingRow have",
        ),
        ([READ, step("AskAudioFlamingo", "ReadRecordings")], "its input must be that of DecodeAudio"),
        ([READ, DECODE, step("AnswerRecordings", "DecodeAudio")], "has no column recording_id|no rows of Recording"),
        (
            [
                READ,
                DECODE,
                ASK,
                step("ReconcileRecordings", {"answers": "AskAudioFlamingo", "letters": "ReadRecordings"}),
            ],
            "must be a mapping of recordings, answers, dead_letters; it is answers, letters",
        ),
        (
            [READ, DECODE, step("AskAudioFlamingo", "DecodeAudio", model="nvidia/other")],
            "model is 'nvidia/other' here and 'demo' in DecodeAudio; it must be the same",
        ),
        (
            [READ, DECODE, ASK, step("Filter", "AskAudioFlamingo", language="python", keep="silent"), RECONCILE],
            "its answers come from another step .* same tasks and questions",
        ),
        ([READ, step("ReconcileRecordings", "ReadRecordings")], "must be a mapping of .*; it is a single one"),
        (
            [
                step("ReadRecordings", inputs="a", error_handling={"output": "good"}),
                step("LogForTesting", "ReadRecordings.good"),
            ],
            "error_handling is .'output': 'good'.; it must be {output: NAME}",
        ),
        ([step("ReadRecordings", inputs="a", error_handling={"output": "bad"})], "Unconsumed error output"),
    ],
)
def test_what_is_wrong_is_told_with_its_key_and_place(transforms, told):
    with pytest.raises(ValueError, match=rf"(?s){told}") as raised:
        build(*transforms)
    assert re.search(r"at line \d+|\"\w+\"", str(raised.value))


def test_columns_that_a_table_does_not_have_are_told():
    added = step("MapToFields", "AskAudioFlamingo", language="python", append=True, fields={"mood": "'sad'"})
    with pytest.raises(ValueError, match="its input has a column mood, which rows of Answer do not have"):
        build(READ, DECODE, ASK, added, step("WriteAnswers", "MapToFields", output="labels/"))


def test_the_pipelines_of_the_documentation_are_built():
    build(*PIPELINE["pipeline"]["transforms"])
    letters = step("WriteDeadLetters", "AnswerRecordings.dead_letters", output="labels/")
    pipeline = build(READ, *GPU_STEP, letters)
    hints = [part.resource_hints for part in pipeline.to_runner_api().components.environments.values()]
    assert any(b"nvidia-l4" in value for hint in hints for value in hint.values())


def test_every_step_is_listed_documented_and_has_the_words_of_a_job():
    (provider,) = yaml.safe_load(Path(PROVIDERS).read_text(encoding="utf-8"))
    assert list(provider["transforms"]) == list(steps.KEYS)
    assert sorted(provider["transforms"].values()) == [
        f"af3pipe.yaml.{name}" for name in __all__ if name != "PROVIDERS"
    ]
    for name, keys in steps.KEYS.items():
        assert {*keys} - {*JobConfig.model_fields} <= {"error_handling", "run_id"}
        (documented,) = re.findall(rf"^\| `{name}` \|.*\| (.*) \|$", DOC, re.MULTILINE)
        if "`DecodeAudio`" not in documented and "`WriteAnswers`" not in documented:
            assert re.findall(r"`(\w+)`", documented) == [key for key in keys if key != "error_handling"]


def test_columns_are_what_every_language_of_beam_reads():
    for row_class in (Recording, Answer, DeadLetter, RecordingRow):
        schema = str(beam.typehints.schemas.typing_to_runner_api(row_type(row_class)))
        assert "pythonsdk" not in schema, row_class
    columns = dict(row_type(Answer)._fields)
    assert columns["stream"] == Optional[int]  # noqa: UP045
    assert list(columns) == list(Answer._fields)
