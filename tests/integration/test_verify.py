"""`--verify-sample` on whole runs: all equal, a planted wrong reply, reduced precision, and the books of it."""

import json
import os
import shutil
from importlib import resources

import pytest
from typer.testing import CliRunner

from af3pipe import cli
from af3pipe.cli.console import EXIT_FAILED
from af3pipe.models import ENGINES
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from af3pipe.transforms.verify import Verified
from tests import fixtures_audio as make
from tests.altered_engine import ALTERED_S

pytestmark = pytest.mark.integration
RATE = 16_000


@pytest.fixture(scope="module")
def altered(tmp_path_factory):
    """Two recordings, of which one gets a wrong reply from `AlteredEngine`."""
    folder = tmp_path_factory.mktemp("altered")
    for name, seconds in {"altered": ALTERED_S, "other": 1}.items():
        (folder / f"{name}.flac").write_bytes(make.flac(make.sound(seconds, RATE), RATE))
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Seven recordings, of which five are answered: each with something that asking again has to get right."""
    folder = tmp_path_factory.mktemp("archive")
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        for name in (
            "siren.flac",
            "corrupt.flac",
            "command_go_back_home_stereo.flac",
            "digits_four_zero_two_nine.mp3",
        ):
            shutil.copy(clips / name, folder)
    (folder / "over.flac").write_bytes(make.flac(make.sound(62, 8000), 8000))  # a cap of 60 s makes two of it
    (folder / "silent.flac").write_bytes(make.flac(0 * make.sound(2, RATE), RATE))
    rows = [
        {"uri": "siren.flac", "question": "Is there speech?"},
        {"uri": "siren.flac", "id": "part", "offset": 0.5, "duration": 1.0},
        {"uri": "command_go_back_home_stereo.flac", "channel": "left"},
        *({"uri": name} for name in ("corrupt.flac", "digits_four_zero_two_nine.mp3", "over.flac")),
        *({"uri": name} for name in ("silent.flac", "missing.flac")),
    ]
    manifest = folder / "asked.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def job(archive, model, output, **changes):
    values = {
        "inputs": [str(archive)],
        "output": str(output),
        "model": str(model),
        "tasks": ["caption", "transcript"],
        "over_length": "split",
        "on_silent": "dead-letter",
        "max_new_tokens": 8,
        "device": "cpu",
        "decode_guard": False,
        "verify_sample": 50,
    }
    return make_job(values | changes)


def record(output):
    (found,) = (output / "_runs").iterdir()  # and nothing is left of what it was made of
    return json.loads(found.read_text())


@pytest.mark.representative
def test_all_of_a_run_is_asked_again_where_there_are_fewer_and_equal(archive, model, tmp_path):
    report = batch.run(job(archive, model, tmp_path))
    assert report.counts.reconciled, report.counts.problems
    assert report.counts.dead_letters == {"decode_error": 1, "silent": 1, "not_found": 1}
    # Four recordings of one segment and one of two, two tasks each, and a question of the manifest's own.
    assert report.verified == Verified(6, 6, 13, 13, 0, ("float32",))
    assert Verified.from_dict(record(tmp_path)["verified"]) == report.verified


def run(archive, model, output, *more):
    arguments = ["run", archive, "--output", output, "--model", model, "--device", "cpu", "--max-new-tokens", 4]
    arguments += ["--engine", "altered", "--task", "caption", "--task", "transcript", "--no-decode-guard", *more]
    arguments += ["--verify-sample", 50]
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=os.environ | {"COLUMNS": "200"})


def test_a_wrong_reply_fails_the_run(altered, model, tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "altered", "tests.altered_engine:AlteredEngine")
    done = run(altered, model, tmp_path)
    assert done.exit_code == EXIT_FAILED, done.output
    assert "(reconciles)" in done.output  # every recording is accounted for: it is the reply that is wrong
    assert "Verified 2 requests by plain generate: 3 of 4 replies equal\n" in done.output
    stopped = "the replies do not verify: 1 of 4 replies differ from those of plain generate; for example "
    assert stopped in done.output
    where = f"{altered / 'altered.flac'} (segment 0, task 'transcript') from token 1 on: "
    assert where in done.output
    assert "WRONG', but alone '" in done.output
    found = record(tmp_path)
    assert found["reconciled"] is True
    (mismatch,) = found["verified"]["mismatches"]
    assert (mismatch["task"], mismatch["fields"], mismatch["first_token"]) == ("transcript", ["text", "tokens"], 1)


@pytest.mark.slow
def test_in_bfloat16_agreement_is_reported_only(altered, model, tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "altered", "tests.altered_engine:AlteredEngine")
    done = run(altered, model, tmp_path, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "rounding in bfloat16 makes some differ)" in done.output
    found = record(tmp_path)["verified"]
    assert found["equal"] < found["replies"] == 4
    assert found["wrong"] == 0
