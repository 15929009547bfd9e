"""The pipeline in docs/yaml.md, run by Beam YAML's own program, writes the output that `af3pipe run` writes."""

import contextlib
import json
import re
import shutil
import subprocess
from datetime import datetime
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import yaml

from af3pipe.pipelines import batch
from af3pipe.pipelines.audit import audit
from af3pipe.pipelines.job import make_job
from af3pipe.schemas import Answer, DeadLetter, RecordingRow
from af3pipe.yaml import PROVIDERS
from tests.integration.runners import ANSWER_TABLES, portable_runner, rows
from tests.integration.servers import python_module
from tests.read_tables import read_table

pytest.importorskip("quickjs", reason="Beam YAML is not installed: pip install 'af3pipe[yaml]'")
from apache_beam.yaml import main

pytestmark = pytest.mark.integration
DOC = (Path(__file__).parents[2] / "docs" / "yaml.md").read_text(encoding="utf-8")
(PIPELINE, *_) = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)
FILE = "--yaml_pipeline_file=pipeline.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the pipeline is run: real clips with a manifest, and what is no audio, too short or digital silence."""
    folder = tmp_path_factory.mktemp("yaml")
    archive = folder / "archive"
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        shutil.copytree(clips, archive, ignore=lambda _, names: sorted(names)[4:])
    (archive / "broken.wav").write_text("no audio at all")
    soundfile.write(archive / "short.wav", np.zeros(10, np.int16), 16000)
    (archive / "asked.jsonl").write_text(
        '{"uri": "station.wav", "question": "Is there speech?", "choices": ["yes", "no"], "station": "K Q"}\n'
        '{"uri": "missing.wav"}\n'
    )
    soundfile.write(archive / "station.wav", np.zeros(9000, np.int16), 8000)
    (folder / "pipeline.yaml").write_text(PIPELINE.replace("[archive/]", "[archive/, archive/asked.jsonl]"))
    shutil.copy(PROVIDERS, folder / "providers.yaml")
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """The rows of a job with the same keys."""
    steps = yaml.safe_load((folder / "pipeline.yaml").read_text())["pipeline"]["transforms"]
    keys = [step["config"] for step in steps if step["type"] in ("ReadRecordings", "AnswerRecordings")]
    values = {key: value for config in keys for key, value in config.items()}
    with contextlib.chdir(folder):
        report = batch.run(make_job(values | {"output": "job/", "decode_guard": False}))
    assert report.counts.reconciled, report.counts.problems
    reasons = ("unsupported_format", "decode_error", "too_short", "not_found")
    assert report.counts.dead_letters == dict.fromkeys(reasons, 1)
    return table_rows(folder / "job")


def table_rows(output):
    # A YAML pipeline does not resume, so it has no need of the key of a recording's work.
    without = ("run_id", "created_at", "work_key")
    return {table: rows(output, table, without=without) for table in (*ANSWER_TABLES, "recordings", "dead_letters")}


def look_at(folder, expected):
    found = table_rows(folder / "labels")
    for table, wanted in expected.items():
        assert wanted, table
        assert found[table] == wanted, table
    found = audit(str(folder / "labels"))
    assert (found.problems, len(found.runs)) == ([], 1)
    captions = [json.loads(line) for path in folder.glob("captions.jsonl*") for line in path.open()]
    of_the_job = [(row["uri"], row["text"]) for row in expected["captions"] if row["end_s"] - row["start_s"] > 1]
    assert sorted((row["uri"], row["caption"]) for row in captions) == sorted(of_the_job)
    assert 0 < len(captions) < len(expected["recordings"])


@pytest.fixture
def empty(folder, monkeypatch):
    """The same folder, since its name is in the rows, without what another run left."""
    for name in ("labels", "station", "letters", "ended"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in folder.glob("*.jsonl*"):
        path.unlink()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.representative
def test_in_this_process(expected, empty):
    main.run([FILE, "--runner=FnApiRunner"])
    look_at(empty, expected)


@pytest.mark.slow
def test_as_a_program_with_workers_elsewhere(expected, empty, tmp_path):
    with portable_runner(tmp_path) as flags:
        ran = subprocess.run([*python_module("apache_beam.yaml.main"), FILE, *flags], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    look_at(empty, expected)


def run_steps(*steps):
    pipeline = {"pipeline": {"transforms": list(steps)}, "providers": [{"include": "providers.yaml"}]}
    main.run([f"--yaml_pipeline={yaml.safe_dump(pipeline)}", "--runner=FnApiRunner"])


def step(name, input_=None, **config):
    return {"type": name, "config": config} | ({"input": input_} if input_ else {})


def written_by_beam(folder):
    """All rows of a folder; Beam's names do not end in .parquet."""
    return pa.concat_tables(read_table(path) for path in folder.iterdir())


@pytest.mark.slow
def test_rows_go_to_beams_own_sinks(expected, empty):
    """Every column of every view survives a filter on it, and Beam's Parquet sink."""
    read = step("ReadRecordings", inputs=["archive/", "archive/asked.jsonl"])
    asked = {"model": "demo", "tasks": ["caption", "transcript"], "decode_guard": False}
    answered = step("AnswerRecordings", "ReadRecordings", over_length="split", **asked)
    is_station = "__import__('json').loads(metadata).get('station') == 'K Q'"
    station = step("Filter", "Answers", language="python", keep=is_station)
    run_steps(
        read,
        answered,
        step("Answers", "AnswerRecordings"),
        station,
        step("WriteToParquet", "Filter", path="station/rows") | {"name": "Station"},
        step("DeadLetters", "AnswerRecordings"),
        step("WriteToParquet", "DeadLetters", path="letters/rows") | {"name": "Letters"},
        step("Rows", "AnswerRecordings"),
        step("WriteToParquet", "Rows", path="ended/rows") | {"name": "Ended"},
    )
    letters, ended, of_station = (written_by_beam(empty / name) for name in ("letters", "ended", "station"))
    assert letters.column_names == list(DeadLetter._fields)
    assert sorted(letters["reason"].to_pylist()) == sorted(row["reason"] for row in expected["dead_letters"])
    assert ended.column_names == list(RecordingRow._fields)
    assert sorted(ended["terminal_state"].to_pylist()) == sorted(r["terminal_state"] for r in expected["recordings"])
    assert of_station.column_names == list(Answer._fields)
    assert {row["task"] for row in of_station.to_pylist()} == {"caption", "transcript", "answer"}
    assert {row["metadata"] for row in of_station.to_pylist()} == {'{"station": "K Q"}'}
    (mtime,) = {row["mtime"] for row in of_station.to_pylist()}
    (of_table,) = {row["mtime"] for row in expected["answers"] if row["metadata"] == '{"station": "K Q"}'}
    assert datetime.fromisoformat(mtime) == of_table


def segments_of(uri, *, decode, ask):
    run_steps(
        step("ReadRecordings", inputs=uri),
        step("DecodeAudio", "ReadRecordings", model="demo", decode_guard=False, **decode),
        step("AskAudioFlamingo", "DecodeAudio", model="demo", tasks=["caption", "transcript"], **ask),
        step("WriteToJson", "AskAudioFlamingo", path="segments.jsonl"),
        *(step("WriteToJson", f"{name}.bad", path=f"{name}.jsonl") | {"name": f"{name}Letters"}
          for name, config in (("DecodeAudio", decode), ("AskAudioFlamingo", ask)) if config),
    )  # fmt: skip
    return [json.loads(line) for path in Path().glob("segments.jsonl*") for line in path.open()]


def test_segments_are_answered_as_recordings_are(expected, empty):
    found = segments_of("archive/beeps_three_low.flac", decode={}, ask={})
    wanted = [row for table in ("captions", "transcripts") for row in expected[table]]
    wanted = [row for row in wanted if row["uri"].endswith("/beeps_three_low.flac")]
    assert sorted((row["answer_key"], row["text"]) for row in found) == sorted(
        (row["answer_key"], row["text"]) for row in wanted
    )
    assert len(found) == 2


def test_dead_letters_of_segments_are_an_output(empty):
    named = {"error_handling": {"output": "bad"}}
    assert segments_of("archive/broken.wav", decode=named, ask=named) == []
    letters = [json.loads(line) for path in Path().glob("DecodeAudio.jsonl*") for line in path.open()]
    assert [(row["stage"], row["reason"]) for row in letters] == [("probe", "unsupported_format")]


def test_without_error_handling_a_dead_letter_ends_the_pipeline(empty):
    says = "unsupported_format: .*broken.wav: .*error_handling: {output: dead_letters}"
    with pytest.raises(Exception, match=f"(?s){says}"):
        segments_of("archive/broken.wav", decode={}, ask={})
    assert not list(empty.glob("segments.jsonl*"))
