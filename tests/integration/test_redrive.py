"""Dead letters run again, from their own rows, by the command line."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from af3pipe import cli
from af3pipe.pipelines.audit import audit
from af3pipe.tables.latest import latest
from tests import fixtures_audio as make
from tests.integration.runners import rows
from tests.outputs import FIRST, write_run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("engines")]
FINE = make.wav(make.sound(1, 16000), 16000)


@pytest.fixture(scope="module")
def once(tmp_path_factory, model, engines):
    """An archive with all kinds of trouble, and what a run made of it."""
    folder = tmp_path_factory.mktemp("redrive")
    archive = folder / "archive"
    archive.mkdir()
    (archive / "fine.wav").write_bytes(FINE)
    (archive / "broken.wav").write_text("no audio")
    (archive / "long.wav").write_bytes(make.wav(np.full((16000 * 61, 1), 0.1, np.float32), 16000))
    (archive / "list.jsonl").write_text(
        '{"uri": "fine.wav", "offset": 0.1, "id": "part"}\n'
        '{"uri": "fine.wav", "offset": "soon"}\n'
        '{"uri": "later.wav", "id": "later", "speaker": "7"}\n'
    )
    done = run(
        *("run", archive, archive / "list.jsonl", "--output", folder / "out", "--model", model),
        *("--engine", "constant", "--no-decode-guard"),
    )
    assert done.exit_code == 0, done.output
    assert reasons(folder / "out") == {
        "broken.wav": "unsupported_format",
        "long.wav": "too_long",
        "list.jsonl#line=2": "unsupported_format",
        "later.wav": "not_found",
    }
    return folder


@pytest.fixture
def again(once, tmp_path):
    """A copy of its output, and the archive itself, as it was."""
    for file in (once / "out").rglob("*"):
        if file.is_file():
            copy = tmp_path / "out" / file.relative_to(once / "out")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    kept = {path: path.read_bytes() for path in (once / "archive").iterdir()}
    yield once / "archive", tmp_path / "out"
    for path in (once / "archive").iterdir():
        path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def reasons(output):
    found = latest(str(output)).read("dead_letters").to_pylist()
    return {row["uri"].rpartition("/")[2]: row["reason"] for row in found}


def states(output):
    found = latest(str(output)).read("recordings").to_pylist()
    return {row["uri"].rpartition("/")[2]: row["terminal_state"] for row in found}


def test_what_was_repaired_succeeds_and_the_rest_stays_as_it_is(again):
    archive, output = again
    before = rows(output, "dead_letters")
    (archive / "broken.wav").write_bytes(make.wav(make.sound(2, 16000), 16000))
    (archive / "later.wav").write_bytes(make.wav(make.sound(3, 16000), 16000))
    done = run("redrive", output)
    assert done.exit_code == 0, done.output
    assert reasons(output) == {"long.wav": "too_long", "list.jsonl#line=2": "unsupported_format"}
    assert rows(output, "dead_letters") == before  # history stays, and what fails as before is no new row
    answered = {row["uri"].rpartition("/")[2]: row for row in rows(output, "captions")}
    assert answered["later.wav"]["recording_id"] == "later"
    assert answered["later.wav"]["metadata"] == '{"speaker": "7"}'
    assert "broken.wav" in answered
    report = audit(str(output), [])
    assert report.right, report.problems


def test_only_what_is_chosen(again):
    archive, output = again
    (archive / "later.wav").write_bytes(FINE)
    done = run("redrive", output, "--stage", "probe", "--stage", "decode")
    assert "later.wav" in reasons(output)
    done = run("redrive", output, "--reason", "not_found")
    assert done.exit_code == 0, done.output
    assert "1 found = 1 ok" in done.output
    assert "later.wav" not in reasons(output)
    done = run("redrive", output, "--retryable")
    assert "No dead letter" in done.output


def test_with_another_policy(again):
    _, output = again
    done = run("redrive", output, "--reason", "too_long", "--set", "over_length=truncate")
    assert done.exit_code == 0, done.output
    assert "long.wav" not in reasons(output)
    assert states(output)["long.wav"] == "ok_partial"
    (newest,) = [
        json.loads(path.read_text())
        for path in (output / "_runs").glob("*.json")
        if json.loads(path.read_text())["job"]["over_length"] == "truncate"
    ]
    assert newest["recordings"] == {"ok_partial": 1}


def test_a_row_that_was_corrected_is_read_from_the_manifest_again(again):
    archive, output = again
    text = (archive / "list.jsonl").read_text()
    (archive / "list.jsonl").write_text(text.replace('"soon"', "0.2"))
    done = run("redrive", output, "--stage", "list")
    assert done.exit_code == 0, done.output
    assert "list.jsonl#line=2" not in reasons(output)
    starts = {row["start_s"] for row in rows(output, "captions")}
    assert starts == {0.0, 0.1, 0.2}
    report = audit(str(output), [])
    assert report.right, report.problems


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reason", "bad_luck"], "--reason is 'bad_luck'; choose from not_found"),
        (["--set", "over_length"], "it must be KEY=VALUE"),
        (["--set", "over_lenght=split"], "did you mean 'over_length'?"),
        (["--set", "over_length=cut"], "over_length is 'cut'"),
        (["another"], "redrive takes one OUT, not also another"),
    ],
)
def test_what_cannot_be_redriven_says_why(once, arguments, said):
    done = run("redrive", once / "out", *arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_runs_that_were_asked_the_same_are_one_run_again(again, model):
    archive, output = again
    (archive / "other.wav").write_text("no audio either")
    asked = ("--model", model, "--engine", "constant", "--no-decode-guard")
    assert run("run", archive / "other.wav", "--output", output, *asked).exit_code == 4
    done = run("redrive", output, "--reason", "unsupported_format", "--stage", "probe")
    assert done.exit_code == 4, done.output  # they fail again
    assert "2 found = 2 dead_letter" in done.output
    assert len(list((output / "_runs").glob("*.json"))) == 3


def test_what_was_secret_has_to_be_given_again(again, tmp_path):
    _, output = again
    for path in (output / "_runs").iterdir():
        record = json.loads(path.read_text())
        record["job"]["storage_options"] = {"s3://archive/": {"key": "***", "secret": "***"}}
        path.write_text(json.dumps(record))
    done = run("redrive", output)
    assert done.exit_code == 2
    assert "storage_options of run" in done.output
    assert "--job FILE" in done.output
    (tmp_path / "job.yaml").write_text("storage_options: {}")
    assert run("redrive", output, "--job", tmp_path / "job.yaml", "--retryable").exit_code == 4  # still not found


def test_an_output_without_dead_letters(tmp_path):
    write_run(tmp_path, FIRST, range(3))
    done = run("redrive", tmp_path)
    assert done.exit_code == 0
    assert "No dead letter" in done.output
