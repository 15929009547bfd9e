"""Checks that what README shows works."""

import ast
import re
from importlib import resources
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from af3pipe import cli
from af3pipe.pipelines.audit import audit
from af3pipe.pipelines.job import make_job
from af3pipe.schemas import Reason, Stage
from af3pipe.tables.latest import latest
from af3pipe.tables.layout import TABLE_SCHEMAS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_job_file_is_one():
    (text,) = re.findall(r"(?:^    .*\n)*^    fail_on_dead_letters.*\n(?:^    .*\n)*", README, re.MULTILINE)
    job = make_job(yaml.safe_load(text), "README")
    assert [task.name for task in job.all_tasks()] == ["caption", "transcript", "mood", "answer"]


def test_the_options_shown_exist():
    help_text = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "200"}).output
    shown = set(re.findall(r"--(?:task|question|over-length|model|output|fail-on-dead-letters)\b", README))
    assert len(shown) == 6
    assert all(option in help_text for option in shown)


def test_the_python_shown_is_python_and_its_names_exist():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    imports = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "README", "exec"), {})


@pytest.mark.slow
def test_the_pipeline_shown_leaves_a_whole_output(tmp_path, capsys):
    """One run, which audit accepts and export finds something in."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    output = str(tmp_path / "labels")
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        names = {
            '"s3://archive/**/*.flac"': repr(str(clips / "[bc]*.flac")),
            '"s3://labels"': repr(output),
            '"nvidia/audio-flamingo-3-hf"': '"demo"',
        }
        for shown, here in names.items():
            assert shown in code
            code = code.replace(shown, here)
        exec(compile(code, "README", "exec"), {})
    found = audit(output)
    assert (found.problems, len(found.runs)) == ([], 1)
    printed = capsys.readouterr().out
    captions = latest(output).read("captions", ["uri", "text"])
    assert captions.num_rows > 1
    assert all(f"{row['uri']} caption {row['text']}" in printed for row in captions.to_pylist())


def test_the_tables_named_are_those_written():
    assert all(f"{table}/" in README for table in TABLE_SCHEMAS)


def test_every_reason_and_stage_is_explained():
    text = (ROOT / "docs" / "dead-letters.md").read_text(encoding="utf-8")
    assert [reason for reason in Reason if f"| `{reason.value}` |" not in text] == []
    assert [stage for stage in Stage if f"`{stage.value}`" not in text] == []
