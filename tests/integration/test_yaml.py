"""The pipeline that docs/yaml.md shows, run by Beam YAML's own program, gives the rows that a job gives."""

import contextlib
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from af3pipe.yaml import PROVIDERS
from tests.integration.runners import ANSWER_TABLES, portable_runner, rows
from tests.integration.servers import python_module

pytest.importorskip("quickjs", reason="Beam YAML is not installed: pip install 'af3pipe[yaml]'")
from apache_beam.yaml import main

pytestmark = pytest.mark.integration
DOC = (Path(__file__).parents[2] / "docs" / "yaml.md").read_text(encoding="utf-8")
(PIPELINE, _) = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)
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
    keys = [step["config"] for step in steps if step["type"] in ("ReadRecordings", "DecodeAudio", "AskAudioFlamingo")]
    values = {key: value for config in keys for key, value in config.items() if key != "error_handling"}
    with contextlib.chdir(folder):
        report = batch.run(make_job(values | {"output": "job/", "decode_guard": False}))
    assert report.counts.reconciled, report.counts.problems
    reasons = ("unsupported_format", "decode_error", "too_short", "not_found")
    assert report.counts.dead_letters == dict.fromkeys(reasons, 1)
    return table_rows(folder / "job")


def table_rows(output):
    # A YAML pipeline has no earlier runs to look at, so nothing is known by the key of its work.
    without = ("run_id", "created_at", "work_key")
    return {table: rows(output, table, without=without) for table in (*ANSWER_TABLES, "recordings", "dead_letters")}


def look_at(folder, expected):
    found = table_rows(folder / "labels")
    for table, wanted in expected.items():
        assert wanted, table
        assert found[table] == wanted, table
    names = {path.name[:23] for path in (folder / "labels").rglob("*.parquet")}
    assert len(names) == 1, "the steps of one pipeline are one run"
    captions = [json.loads(line) for path in folder.glob("captions.jsonl*") for line in path.open()]
    of_the_job = [(row["uri"], row["text"]) for row in expected["captions"] if row["end_s"] - row["start_s"] > 1]
    assert sorted((row["uri"], row["caption"]) for row in captions) == sorted(of_the_job)
    assert 0 < len(captions) < len(expected["recordings"])


@pytest.fixture
def empty(folder, monkeypatch):
    """The same folder, since its name is in the rows, without what another run left."""
    shutil.rmtree(folder / "labels", ignore_errors=True)
    for path in folder.glob("captions.jsonl*"):
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


TASKS = ["caption", "transcript"]


def one_step_over(uri):
    steps = [
        {"type": "ReadRecordings", "config": {"inputs": uri}},
        {"type": "AnswerRecordings", "config": {"model": "demo", "tasks": TASKS, "decode_guard": False}},
        {"type": "WriteAnswers", "config": {"output": "labels/", "run_id": "20260102T030405Z-mine"}},
    ]
    pipeline = {"pipeline": {"type": "chain", "transforms": steps}, "providers": [{"include": "providers.yaml"}]}
    main.run([f"--yaml_pipeline={yaml.safe_dump(pipeline)}", "--runner=FnApiRunner"])


def test_one_step_answers_as_two_do(expected, empty):
    one_step_over("archive/beeps_three_low.flac")
    for table, found in table_rows(empty / "labels").items():
        if table in ("captions", "transcripts"):
            assert found == [row for row in expected[table] if row["uri"].endswith("/beeps_three_low.flac")] != []
    assert {path.name[:21] for path in (empty / "labels").rglob("*.parquet")} == {"20260102T030405Z-mine"}


def test_without_error_handling_a_dead_letter_ends_the_pipeline(empty):
    told = "unsupported_format: .*broken.wav: .*error_handling: {output: dead_letters}"
    with pytest.raises(Exception, match=f"(?s){told}"):
        one_step_over("archive/broken.wav")
    assert not list(empty.glob("labels/**/*.parquet"))
