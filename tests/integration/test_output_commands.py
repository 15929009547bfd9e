"""`af3pipe audit`, `compact` and `export` on what a real run wrote, and on an S3 server."""

import functools
import itertools
import json
import os

import pytest
from typer.testing import CliRunner

from af3pipe import cli
from af3pipe.pipelines.audit import audit
from af3pipe.tables import write
from af3pipe.tables.compact import compact, recover
from af3pipe.tables.compaction_record import open_compactions
from af3pipe.tables.latest import latest
from af3pipe.transforms.inputs.read import list_recordings
from tests import fixtures_audio as make
from tests import outputs
from tests.integration.servers import s3_by_environment
from tests.kills import killed_after
from tests.outputs import FIRST, SECOND, write_run
from tests.read_tables import read_table

pytestmark = pytest.mark.integration
WIDE = os.environ | {"COLUMNS": "200"}


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=WIDE)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, engines):
    folder = tmp_path_factory.mktemp("ran")
    archive = folder / "archive"
    archive.mkdir()
    (archive / "fine.wav").write_bytes(make.wav(make.sound(1, 16000), 16000))
    (archive / "other.wav").write_bytes(make.wav(make.sound(2, 16000), 16000))
    (archive / "broken.wav").write_text("not audio")
    options = ("--model", "demo", "--engine", "constant", "--no-decode-guard", "--partition-by", "date")
    done = command("run", archive, "--output", folder / "out", "--task", "caption", "--task", "transcript", *options)
    assert done.exit_code == 0, done.output
    assert "Verified" not in done.output
    (record,) = (folder / "out" / "_runs").iterdir()
    assert json.loads(record.read_text())["verified"] is None
    return folder


def test_a_real_run_is_right(ran):
    done = command("audit", ran / "out", "--input", ran / "archive")
    assert done.exit_code == 0, done.output
    assert "Rows: 2 in captions/, 2 in transcripts/, 3 in recordings/, 1 in dead_letters/, in 4 files" in done.output
    assert "Recordings now: 3 = 1 dead_letter, 2 ok" in done.output
    assert "Recordings in the input: 3" in done.output
    assert "The output is consistent." in done.output
    assert all(path.parent.name.startswith("date=20") for path in (ran / "out").rglob("*.parquet"))


def test_compact_and_export_of_a_real_run(ran):
    done = command("compact", ran / "out")
    assert (done.exit_code, done.output) == (0, "Nothing to compact\n")
    done = command("export", ran / "out", ran / "clean", "--table", "captions")
    assert done.exit_code == 0, done.output
    assert f"2 rows in {ran}/clean/captions.parquet" in done.output
    assert read_table(ran / "clean" / "captions.parquet").num_rows == 2


def test_what_is_wrong_is_said_with_what_to_do(tmp_path):
    write_run(tmp_path, FIRST, range(9), broken=[9])
    next((tmp_path / "dead_letters").iterdir()).unlink()
    done = command("audit", tmp_path)
    assert done.exit_code == 1, done.output
    assert "WRONG (missing): 1 dead letters are referenced by recordings/ and have no row" in done.output
    assert "what to do: run the job again into the same output" in done.output
    report = json.loads(command("audit", tmp_path, "--json").output)
    assert report["right"] is False
    assert {problem["kind"] for problem in report["problems"]} == {"missing", "miscounted"}


COMMANDS = {
    "audit": [],
    "compact": [],
    "export": ["TARGET"],
    "redrive": [],
    "finish": ["20260102T030405Z-abcdef"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "empty", "file", "other files", "bucket", "empty bucket"])
def test_what_is_no_output_is_refused_and_left_as_it_is(name, kind, tmp_path, s3):
    output = tmp_path / "out"
    if kind in ("empty", "other files"):
        output.mkdir()
    if kind == "file":
        output.write_text("notes")
    if kind == "other files":
        (output / "captions").mkdir()
        (output / "captions" / "a.txt").write_text("mine")
    uri = {"bucket": "s3://no-such-bucket/out", "empty bucket": "s3://labels/none"}.get(kind, str(output))
    before = sorted(map(str, tmp_path.rglob("*"))), s3.find("labels")
    done = command(name, uri, *(str(tmp_path / "clean") if more == "TARGET" else more for more in COMMANDS[name]))
    assert done.exit_code == 2, done.output
    assert f"{uri} has no tables and no runs of af3pipe" in done.output.replace("\n", "")
    assert "Traceback" not in done.output
    assert (sorted(map(str, tmp_path.rglob("*"))), s3.find("labels")) == before


def test_an_unknown_table_is_refused(tmp_path):
    assert command("export", tmp_path, tmp_path, "--table", "caption").exit_code == 2


def test_compact_says_what_it_did(tmp_path):
    write_run(tmp_path, FIRST, range(20))
    write_run(tmp_path, SECOND, range(20))
    done = command("compact", tmp_path, "--latest")
    assert done.exit_code == 0, done.output
    assert "12 files are now 2, with 40 rows" in done.output
    assert "20 duplicate rows were deleted" in done.output
    assert "20 superseded rows were deleted" in done.output


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_by_environment(tmp_path_factory.mktemp("s3"), "labels") as found:
        yield found


def holding(output):
    view = latest(output)
    return {table: sorted(map(repr, view.read(table).to_pylist())) for table in ("captions", "recordings")}


@pytest.mark.slow
def test_a_compaction_on_s3_may_be_killed_after_any_write_or_delete(s3):
    for number in itertools.count():
        output = f"s3://labels/out {number}"
        write_run(output, FIRST, range(6), in_files_of=4)
        write_run(output, SECOND, range(4, 7), version="better", later_s=60)
        before = holding(output)
        killed = killed_after(number, functools.partial(compact, output, only_latest=True))
        assert holding(output) == before, number
        recover(output)
        assert open_compactions(output) == []
        report = audit(output)
        assert report.right, (number, report.problems)
        assert holding(output) == before, number
        if not killed:
            break
    assert number > 10
    assert len(s3.glob(f"{output.removeprefix('s3://')}/captions/*.parquet")) == 1


def test_what_was_written_anew_with_the_same_bytes_has_not_changed(s3):
    s3.mkdir("recorded")
    s3.pipe_file("recorded/a.wav", b"one")
    (found,) = list_recordings("s3://recorded/")
    row = outputs.recording_row(0, [outputs.answer_row(0)])
    row = row._replace(recording_id=found.recording_id, uri=found.uri, etag=found.etag, mtime=found.mtime)
    answer = outputs.answer_row(0)._replace(recording_id=found.recording_id)
    outputs.write_rows("s3://labels/changes", FIRST, write.RECORDINGS, [row._replace(mtime="2020-01-01T00:00:00Z")])
    outputs.write_rows("s3://labels/changes", FIRST, write.ANSWERS, [answer])
    s3.pipe_file("recorded/a.wav", b"one")
    problems = audit("s3://labels/changes", ["s3://recorded/"]).problems
    assert [problem.kind for problem in problems] == ["unknown_run"]  # there is no record here, and nothing else
    s3.pipe_file("recorded/a.wav", b"two")
    problems = audit("s3://labels/changes", ["s3://recorded/"]).problems
    assert {problem.kind for problem in problems} == {"unknown_run", "changed"}
