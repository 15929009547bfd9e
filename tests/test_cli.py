import json
import os
import pty
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from af3pipe import cli
from af3pipe.cli import running, tables
from af3pipe.models.family import DEFAULT_MODEL
from af3pipe.tables import write
from af3pipe.tables.compact import DEFAULT_FILE_MIB
from af3pipe.tables.layout import TABLE_SCHEMAS
from af3pipe.tables.write import RECORDINGS, write_folders
from tests import fixtures_audio as make
from tests.integration.runners import rows

pytestmark = pytest.mark.integration
PROGRAM = [sys.executable, "-m", "af3pipe"]
WIDE = os.environ | {"COLUMNS": "200"}


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    (folder / "fine.wav").write_bytes(make.wav(make.sound(1, 16000), 16000))
    (folder / "broken.wav").write_text("not audio")
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=WIDE)


def quick(archive, output, *more):
    return run("run", archive, "--output", output, "--model", "demo", "--max-new-tokens", 4, "--device", "cpu", *more)


def on_a_terminal(*arguments):
    """Runs the program with its standard error on a terminal: (exit code, standard output, standard error)."""
    terminal, other_end = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, stderr=other_end, env=WIDE, text=True
    ) as process:
        os.close(other_end)
        seen = b""
        while True:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # the other end was closed
                break
            seen += data
        printed = process.stdout.read()
    os.close(terminal)
    return process.returncode, printed, seen.decode()


@pytest.mark.representative
def test_demo_on_a_terminal(tmp_path):
    code, printed, seen = on_a_terminal("demo", "--output", tmp_path)
    assert code == 0, seen
    assert "WARNING" not in seen
    assert re.search(r"\d+ / 13 recordings, [\d.]+ audio s/s, \d dead letters", seen), "how far it is"
    assert "zwei hohe Töne.flac" in printed
    assert re.search(r"digits_seven_three_one\.flac +│ 2\.0 .*seven three one", printed)
    assert re.search(r"over_length\.wav +│ probe +│ too_long", printed)
    assert "13 found = 2 dead_letter, 11 ok (reconciles)" in printed
    assert "seconds of audio per second" in printed
    transcripts = {Path(row["uri"]).name: row["text"] for row in rows(tmp_path, "transcripts")}
    assert transcripts["digits_four_zero_two_nine.mp3"] == "four zero two nine"
    assert transcripts["command_go_back_home_stereo.flac"] == "go back home"
    (record,) = (tmp_path / "_runs").glob("*.json")
    found = json.loads(record.read_text())
    assert found["reconciled"] is True
    assert found["model"]["licence"]
    assert found["versions"]["transformers"]


def test_run_asks_what_it_is_told(archive, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "Is there music?", "id": "music"}) + "\n")
    done = quick(
        archive,
        tmp_path / "out",
        *("--task", "transcript"),
        *("--question", "Is there speech?"),
        *("--questions", questions),
        *("--prompt", "mood=What mood is this?"),
    )
    assert done.exit_code == 0, done.output
    answers = {(row["task"], row["question"], row["prompt"]) for row in rows(tmp_path / "out", "answers")}
    assert answers == {
        ("answer", "Is there speech?", "Is there speech?"),
        ("answer", "Is there music?", "Is there music?"),
        ("mood", None, "What mood is this?"),
    }
    assert len(rows(tmp_path / "out", "transcripts")) == 1
    assert "2 found = 1 dead_letter, 1 ok (reconciles)" in done.output


def test_a_job_file_does_the_same_and_options_win(archive, tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(f"inputs: ['{archive}/fine.wav']\noutput: {tmp_path / 'a'}\nmodel: demo\nmax_new_tokens: 4\n")
    assert run("run", job, "--output", tmp_path / "b").exit_code == 0
    assert not (tmp_path / "a").exists()
    assert len(rows(tmp_path / "b", "captions")) == 1
    assert rows(tmp_path / "b", "dead_letters") == []  # the table is there, without rows
    assert (tmp_path / "b" / "dead_letters").is_dir()


@pytest.mark.parametrize(("allowed", "code"), [("0", 3), ("1", 0), ("49%", 3), ("50%", 0)])
def test_dead_letters_fail_a_run_only_when_asked(archive, tmp_path, allowed, code):
    done = quick(archive, tmp_path / "out", "--fail-on-dead-letters", allowed)
    assert done.exit_code == code
    assert ("more than --fail-on-dead-letters" in done.output) == (code == 3)


def test_how_the_model_is_run_is_recorded(archive, tmp_path):
    told = ["--think", "--attention", "eager", "--no-cuda-graphs", "--slots", "2", "--question", "Is there speech?"]
    done = quick(archive, tmp_path / "out", *told)
    assert done.exit_code == 0, done.output
    (row,) = rows(tmp_path / "out", "answers")
    assert row["prompt"] == "Is there speech?\nPlease think and reason about the input audio before you respond."
    assert (row["question"], row["history"]) == ("Is there speech?", [])
    (record,) = (tmp_path / "out" / "_runs").glob("*.json")
    job = json.loads(record.read_text())["job"]
    assert (job["attention"], job["cuda_graphs"], job["think"], job["adapter"]) == ("eager", False, True, None)


def test_silence_is_left_unasked_when_told(archive, tmp_path):
    (archive / "silent.wav").write_bytes(make.wav(0 * make.sound(1, 16000), 16000))
    told = ["--on-silent", "dead-letter", "--silent-below", "-70", "--over-length", "split", "--split-at", "silence"]
    done = quick(archive, tmp_path / "out", *told, "--split-tolerance-s", "5")
    assert done.exit_code == 0, done.output
    assert "1 silent" in done.output
    (letter,) = [row for row in rows(tmp_path / "out", "dead_letters") if row["reason"] == "silent"]
    assert "up to -70 counts as silence" in letter["detail"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "sing"], "task 'sing' is not known"),
        (["--over-length", "cut"], "over_length is 'cut'"),
        (["--split-at", "silence"], "split_at is 'silence', but over_length is 'dead-letter'"),
        (["--silent-below", "60"], "silent_below is 60"),
        (["--channel", "middle"], "channel is 'middle'"),
        (["--stream", "-1"], "stream is '-1'"),
        (["--ouput", "x"], "--ouput is neither an option of af3pipe nor of Beam"),
        (["--prompt", "no name"], "it must be NAME=TEXT"),
        (["--questions", "/nowhere.txt"], "--questions /nowhere.txt"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--adapter", "/nowhere"], "adapter '/nowhere': looked for a PEFT adapter in /nowhere"),
        (["--quantize", "int3"], "quantize is 'int3'"),
        (["--task", "caption", "--task", "caption"], "task 'caption' is asked twice"),
        (["--question", "Who? | cat | cat"], "choices"),
        (["--runner", "NoRunner"], "NoRunner"),
        (["--fail-on-dead-letters", "lots"], "fail_on_dead_letters is 'lots'"),
    ],
    ids=lambda found: found[0] if isinstance(found, list) else "",
)
def test_a_wrong_job_exits_2_and_says_why(archive, tmp_path, arguments, says):
    done = quick(archive, tmp_path / "out", *arguments)
    assert done.exit_code == 2, done.output
    assert says in done.output.replace("\n", " ")
    assert not rows(tmp_path / "out", "captions")


def test_the_two_sides_of_a_call_are_two_recordings(tmp_path):
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        sides = [
            soundfile.read(clips / name)[0] for name in ("digits_seven_three_one.flac", "command_open_door.flac")
        ]
    call = np.zeros((max(map(len, sides)), 2))
    for index, side in enumerate(sides):
        call[: len(side), index] = side
    soundfile.write(tmp_path / "call.wav", call, 16_000)
    (tmp_path / "calls.csv").write_text("uri,channel\ncall.wav,left\ncall.wav,right\ncall.wav,2\n")
    done = quick(tmp_path / "calls.csv", tmp_path / "out", "--task", "transcript", "--max-new-tokens", 16)
    assert done.exit_code == 0, done.output
    assert {row["channel"]: row["text"] for row in rows(tmp_path / "out", "transcripts")} == {
        "left": "seven three one",
        "right": "open door",
    }
    (letter,) = rows(tmp_path / "out", "dead_letters")
    assert "Channel 2 was requested, but the audio has 2 channels" in letter["detail"]
    states = {row["channel"]: row["terminal_state"] for row in rows(tmp_path / "out", "recordings")}
    assert states == {"left": "ok", "right": "ok", "2": "dead_letter"}
    one = quick(tmp_path / "call.wav", tmp_path / "one", "--task", "transcript", "--channel", "right")
    assert one.exit_code == 0, one.output
    (row,) = rows(tmp_path / "one", "transcripts")
    assert (row["channel"], row["stream"], row["channels"]) == ("right", None, 2)


def test_nothing_to_read_exits_2(tmp_path):
    done = run("run", tmp_path / "*.wav", "--output", tmp_path / "out", "--model", "demo")
    assert done.exit_code == 2
    assert "no input matched" in done.output


def test_the_same_missing_file_twice_is_one_dead_letter(archive, tmp_path):
    done = quick(archive, tmp_path / "out", tmp_path / "nope.wav", tmp_path / "nope.wav")
    assert done.exit_code == 0, done.output
    assert "3 found = 2 dead_letter, 1 ok (reconciles)" in done.output


def test_secrets_are_not_recorded(archive, tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(
        f"inputs: {archive}\noutput: {tmp_path / 'out'}\nmodel: demo\nmax_new_tokens: 4\n"
        "beam: {s3_secret_access_key: SECRET123, s3_session_token: SECRET123}\n"
    )
    assert run("run", job).exit_code == 0
    (record,) = (tmp_path / "out" / "_runs").glob("*.json")
    assert "SECRET123" not in record.read_text()
    assert json.loads(record.read_text())["job"]["max_new_tokens"] == 4


def test_dead_letters_of_an_earlier_run_count_as_long_as_they_hold(archive, tmp_path):
    assert quick(archive, tmp_path / "out", "--fail-on-dead-letters", "0").exit_code == 3
    again = quick(archive, tmp_path / "out", "--fail-on-dead-letters", "0")
    assert again.exit_code == 3
    assert "1 of earlier runs are still current" in again.output
    (archive / "broken.wav").unlink()
    assert quick(archive, tmp_path / "out", "--fail-on-dead-letters", "0").exit_code == 0


def test_counts_that_do_not_reconcile_exit_1_and_name_the_gap(archive, tmp_path, monkeypatch):
    def losing(rows, row_format, *where, **how):
        kept = [row for row in rows if row_format is not RECORDINGS or not row.uri.endswith("fine.wav")]
        return write_folders(kept, row_format, *where, **how)

    monkeypatch.setattr(write, "write_folders", losing)
    done = quick(archive, tmp_path / "out")
    assert done.exit_code == 1
    assert "DOES NOT RECONCILE" in done.output
    assert "2 recordings found, but 1 recordings with a terminal state" in done.output.replace("\n", " ")
    (record,) = (tmp_path / "out" / "_runs").glob("*.json")
    assert json.loads(record.read_text())["reconciled"] is False


@pytest.fixture
def watched(monkeypatch):
    """What `watch` would start: (job, options for Beam) of each."""
    found = []
    monkeypatch.setattr(running, "watch_job", lambda job, beam_flags: found.append((job, beam_flags)))
    return found


def test_options_of_a_watch_win_over_its_file(tmp_path, watched):
    job = tmp_path / "job.yaml"
    job.write_text("inputs: in/\noutput: out\nwatch: {every: 10s, window: 1m, shards: 3}\n")
    told = run("watch", job, "--every", "5s", "--stop-after", "1h", "--model", "demo", "--runner", "flink")
    assert told.exit_code == 1  # nothing was started, which is told as a watch that was cancelled
    assert "cancelled; the next run or watch with the same --output" in told.output.replace("\n", " ")
    ((found, beam_flags),) = watched
    assert found.watch.model_dump() == {
        "every": 5.0,
        "window": 60.0,
        "pane_every": 60.0,
        "stop_after": 3600.0,
        "shards": 3,
    }
    assert (found.inputs, found.output, found.model) == (("in/",), "out", "demo")
    assert beam_flags == ["--runner", "flink"]


def test_a_watch_takes_folders_and_options_alone(watched):
    run("watch", "in/", "s3://b/*.flac", "--output", "out", "--window", "2m", "--pane-every", "1.5")
    ((found, _),) = watched
    assert found.inputs == ("in/", "s3://b/*.flac")
    assert (found.watch.window, found.watch.pane_every, found.watch.every) == (120.0, 1.5, 30.0)


def test_a_file_without_watch_takes_options_of_one(tmp_path, watched):
    job = tmp_path / "job.yaml"
    for text in ("inputs: in/\noutput: out\n", "inputs: in/\noutput: out\nwatch:\n"):
        job.write_text(text)
        run("watch", job, "--every", "5s")
    assert [found.watch.every for found, _ in watched] == [5.0, 5.0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["in/", "--every", "often"], "watch.every: it must be a time such as 30s, 5m or 1h"),
        (["in/", "--stop-after", "0s"], "watch.stop_after is '0s': input should be greater than 0"),
        (["in/", "--evry", "5s"], "--evry is neither an option of af3pipe nor of Beam"),
        (
            ["calls.csv"],
            "calls.csv is a manifest or a container; only folders and globs of audio can be watched",
        ),
        (["in/", "shards/*.tar"], "Process it with `af3pipe run`"),
        (["in/", "--runner", "FnApiRunner"], "runner FnApiRunner writes nothing before its input ends"),
        (["in/", "--runner", "local"], "or name Flink or Dataflow"),
        (["pubsub://mine"], "no URI that messages may reference is allowed: give --allow-prefix"),
        (["pubsub://mine", "--allow-prefix", "/in"], "write projects/PROJECT/subscriptions/NAME"),
        (["in/", "--verify-sample", "5"], "verify_sample is for `af3pipe run`"),
    ],
    ids=lambda found: " ".join(found) if isinstance(found, list) else "",
)
def test_a_wrong_watch_exits_2_and_says_why(tmp_path, arguments, says):
    done = run("watch", *arguments, "--output", tmp_path / "out", "--model", "demo", "--device", "cpu")
    assert done.exit_code == 2, done.output
    assert says in done.output.replace("\n", " ")
    assert "Traceback" not in done.output
    assert not (tmp_path / "out" / "_runs").exists()


def test_a_job_file_with_a_wrong_watch_exits_2(tmp_path):
    job = tmp_path / "job.yaml"
    for text, says in (("5s", "watch"), ("{evry: 5s}", "watch.evry is not a key of a job; did you mean 'every'?")):
        job.write_text(f"inputs: in/\noutput: {tmp_path / 'out'}\nwatch: {text}\n")
        for more in ([], ["--every", "5s"]):
            done = run("watch", job, *more)
            assert done.exit_code == 2, done.output
            assert says in done.output.replace("\n", " ")


def test_version_and_help():
    assert run("--version").output.startswith("af3pipe ")
    assert "non-commercial" in run("run", "--help").output


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"], ["compact", "--help"]])
def test_help_imports_nothing_that_takes_seconds(arguments):
    """Beam, Arrow and what else a run needs are imported when a command runs."""
    code = f"import sys; from af3pipe.__main__ import main; sys.argv = ['af3pipe', *{arguments}]; main()"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "typer" in imported
    assert imported & {"apache_beam", "pyarrow", "numpy", "fsspec", "huggingface_hub", "torch"} == set()


def test_what_help_states_is_so():
    """The modules that declare options must not import what the values come from."""
    assert f"the default is {DEFAULT_MODEL}" in run("run", "--help").output
    assert f"default: {DEFAULT_FILE_MIB}" in run("compact", "--help").output
    assert list(TABLE_SCHEMAS) == tables._TABLES
