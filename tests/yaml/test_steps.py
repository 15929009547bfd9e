"""Beam YAML pipelines are checked when they are built: nothing here runs."""

import re
from pathlib import Path
from typing import Optional

import apache_beam as beam
import pyarrow as pa
import pytest
import yaml
from apache_beam.typehints.arrow_type_compatibility import arrow_schema_from_beam_schema
from apache_beam.typehints.schemas import typing_to_runner_api

from af3pipe.pipelines.job import JobConfig
from af3pipe.schemas import ANSWER_SCHEMA, DEAD_LETTER_SCHEMA, RECORDING_SCHEMA, Answer, DeadLetter, RecordingRow
from af3pipe.yaml import PROVIDERS, __all__, steps
from af3pipe.yaml.rows import row_type

pytest.importorskip("quickjs", reason="Beam YAML is not installed: pip install 'af3pipe[yaml]'")
from apache_beam.yaml import main

DOC = (Path(__file__).parents[2] / "docs" / "yaml.md").read_text(encoding="utf-8")
PIPELINE, GPU_STEP, SEGMENTS = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL))


def build(*transforms):
    text = yaml.safe_dump({"pipeline": {"transforms": list(transforms)}, "providers": [{"include": PROVIDERS}]})
    _, construct = main.build_pipeline_components_from_yaml(text, [])
    pipeline = beam.Pipeline()
    construct(pipeline)
    return pipeline


def step(name, input_=None, **config):
    found = {"type": name, "config": config}
    return found | ({"input": input_} if input_ else {})


TABLES = {Answer: ANSWER_SCHEMA, DeadLetter: DEAD_LETTER_SCHEMA, RecordingRow: RECORDING_SCHEMA}
READ = step("ReadRecordings", inputs=["archive/"])
ANSWER = step("AnswerRecordings", "ReadRecordings", model="demo")
DECODE = step("DecodeAudio", "ReadRecordings", model="demo")
ASK = step("AskAudioFlamingo", "DecodeAudio", model="demo")


@pytest.mark.parametrize(
    ("transforms", "says"),
    [
        ([step("ReadRecordings")], "config: inputs is missing"),
        ([step("ReadRecordings", inputs=[])], "config: inputs is missing; name a file"),
        ([step("ReadRecordings", input="a")], "input is not a key of ReadRecordings; did you mean 'inputs'"),
        (
            [step("ReadRecordings", inputs="a", model="demo")],
            "model is not a key of ReadRecordings; it is one of AnswerR",
        ),
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
            [READ, step("AnswerRecordings", "ReadRecordings", over_length="cut")],
            "AnswerRecordings.* over_length is 'cut'",
        ),
        (
            [READ, step("AnswerRecordings", "ReadRecordings", tasks=["sing"])],
            "AnswerRecordings.* tasks.0: task 'sing' is not known",
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
        (
            [READ, DECODE, step("AskAudioFlamingo", "DecodeAudio", model="nvidia/other")],
            "model is 'nvidia/other' here and 'demo' in DecodeAudio; it must be the same",
        ),
        ([READ, ANSWER, step("WriteResults", "AnswerRecordings")], "config: output is missing"),
        ([READ, ANSWER, step("WriteResults", "AnswerRecordings", output="")], "output is '': string should have"),
        (
            [READ, ANSWER, step("WriteResults", "AnswerRecordings", output="o", partition_by=["task"])],
            "partition_by names 'task', which is a column",
        ),
        (
            [READ, ANSWER, step("WriteResults", "AnswerRecordings", output="o", run_id=7)],
            "run_id is 7; it must be text",
        ),
        (
            [READ, ANSWER, step("WriteResults", "AnswerRecordings", output="o", run_id="../../escaped")],
            "run_id is '../../escaped'; it must be 1 to 100 letters, digits",
        ),
        (
            [READ, ANSWER, step("Answers", "AnswerRecordings", tasks=["caption"])],
            "tasks is not a key of Answers; it is one of AnswerRecordings",
        ),
        (
            [READ, ANSWER, step("Rows", "AnswerRecordings", columns=["uri"])],
            "columns is not a key of Rows; it takes none",
        ),
    ],
)
def test_a_wrong_key_is_reported_with_its_step_and_line(transforms, says):
    refused(transforms, says)


NO_OBJECTS, NO_SEGMENTS, NO_RESULTS = (
    "its input must be that of ReadRecordings, which is audio objects; it is",
    "its input must be that of DecodeAudio, which is segments; it is",
    "its input must be that of AnswerRecordings, which is results; it is",
)


@pytest.mark.parametrize(
    ("transforms", "says"),
    [
        ([READ, DECODE, step("AnswerRecordings", "DecodeAudio")], NO_OBJECTS),
        ([READ, ANSWER, step("DecodeAudio", "AnswerRecordings")], NO_OBJECTS),
        ([READ, step("AskAudioFlamingo", "ReadRecordings")], NO_SEGMENTS),
        ([READ, step("WriteResults", "ReadRecordings", output="o")], NO_RESULTS),
        ([READ, DECODE, ASK, step("WriteResults", "AskAudioFlamingo", output="o")], NO_RESULTS),
        ([READ, DECODE, step("Answers", "DecodeAudio")], NO_RESULTS),
        ([READ, DECODE, step("DeadLetters", "DecodeAudio")], NO_RESULTS),
        ([READ, DECODE, step("Rows", "DecodeAudio")], NO_RESULTS),
    ],
)
def test_a_wrong_input_is_reported_with_the_step_whose_output_is_needed(transforms, says):
    refused(transforms, says)


@pytest.mark.parametrize(
    ("name", "source", "config"),
    [
        ("ReadRecordings", None, {"inputs": "a"}),
        ("AnswerRecordings", "ReadRecordings", {"model": "demo"}),
        ("WriteResults", "AnswerRecordings", {"output": "o"}),
        ("Answers", "AnswerRecordings", {}),
        ("DeadLetters", "AnswerRecordings", {}),
        ("Rows", "AnswerRecordings", {}),
    ],
)
def test_error_handling_is_for_the_steps_that_work_on_segments(name, source, config):
    before = [found for found in (READ, ANSWER) if found["type"] != name]
    wrong = step(name, source, error_handling={"output": "bad"}, **config)
    says = f"error_handling is not a key of {name}; it is one of DecodeAudio, AskAudioFlamingo"
    refused([*before, wrong, step("LogForTesting", f"{name}.bad")], says)


def test_the_output_of_dead_letters_needs_a_name_of_its_own_and_a_step_that_reads_it():
    good = step("DecodeAudio", "ReadRecordings", error_handling={"output": "good"})
    says = "error_handling is .'output': 'good'.; it must be {output: NAME}"
    refused([READ, good, step("LogForTesting", "DecodeAudio.good")], says)
    bad = {"output": "bad"}
    refused([READ, step("DecodeAudio", "ReadRecordings", error_handling=bad)], "Unconsumed error output")
    refused([READ, DECODE, step("AskAudioFlamingo", "DecodeAudio", error_handling=bad)], "Unconsumed error output")


def refused(transforms, says):
    with pytest.raises(ValueError, match=rf"(?s){says}") as raised:
        build(*transforms)
    assert re.search(r"at line \d+|\"\w+\"", str(raised.value))


def test_the_pipelines_of_the_documentation_are_built():
    build(*PIPELINE["pipeline"]["transforms"])
    written = step("WriteResults", "AnswerRecordings", output="labels/")
    pipeline = build(READ, *GPU_STEP, written)
    hints = [part.resource_hints for part in pipeline.to_runner_api().components.environments.values()]
    assert any(b"nvidia-l4" in value for hint in hints for value in hint.values())
    build(READ, *SEGMENTS)


def test_every_step_is_listed_and_documented_with_the_keys_of_a_job():
    (provider,) = yaml.safe_load(Path(PROVIDERS).read_text(encoding="utf-8"))
    assert list(provider["transforms"]) == list(steps.KEYS)
    assert sorted(provider["transforms"].values()) == [
        f"af3pipe.yaml.{name}" for name in sorted(__all__) if name != "PROVIDERS"
    ]
    for name, keys in steps.KEYS.items():
        assert {*keys} - {*JobConfig.model_fields} <= {"error_handling", "run_id"}
        (documented,) = re.findall(rf"^\| `{name}` \|.*\| (.*) \|$", DOC, re.MULTILINE)
        if "`DecodeAudio`" not in documented:
            assert re.findall(r"`(\w+)`", documented) == [key for key in keys if key != "error_handling"]


def test_columns_are_what_every_language_of_beam_reads():
    for row_class in TABLES:
        schema = str(beam.typehints.schemas.typing_to_runner_api(row_type(row_class)))
        assert "pythonsdk" not in schema, row_class
    assert dict(row_type(Answer)._fields)["stream"] == Optional[int]  # noqa: UP045
    assert dict(row_type(RecordingRow)._fields)["mtime"] == Optional[str]  # noqa: UP045


def kinds_in(field):
    """The kinds of a field's type and of what is in it, from the outside in."""
    kind = field.WhichOneof("type_info")
    if kind == "row_type":
        return [kind, *(inner for part in field.row_type.schema.fields for inner in kinds_in(part.type))]
    return [kind, *kinds_in(field.array_type.element_type)] if kind == "array_type" else [kind]


def test_columns_are_what_bigquery_can_hold():
    """It has neither maps nor arrays of arrays, and a logical type would need one of its own."""
    for row_class in TABLES:
        for field in typing_to_runner_api(row_type(row_class)).row_type.schema.fields:
            kinds = kinds_in(field.type)
            assert {*kinds} <= {"atomic_type", "array_type", "row_type"}, field.name
            assert kinds.count("array_type") <= 1, field.name


def test_columns_are_those_of_the_tables_but_for_times():
    for row_class, table in TABLES.items():
        found = arrow_schema_from_beam_schema(typing_to_runner_api(row_type(row_class)).row_type.schema)
        assert found.names == table.names
        other = {field.name for field in found if not is_as(field.type, table.field(field.name).type)}
        assert other == {"mtime", "created_at"} & {*table.names}


def is_as(found, wanted):
    """Whether a type holds the same values; numbers may be wider."""
    if pa.types.is_struct(found):
        return all(is_as(one.type, other.type) for one, other in zip(found, wanted, strict=True))
    if pa.types.is_list(found):
        return pa.types.is_list(wanted) and is_as(found.value_type, wanted.value_type)
    return found == wanted or (pa.types.is_integer(found) and pa.types.is_integer(wanted))
