"""The same run from and to every object store, each a real server, gives the rows of the run on local files."""

import json
import shutil
from importlib import resources

import pytest

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from tests.integration.servers import S3, STORES, store_server, using
from tests.read_tables import read_table

pytestmark = pytest.mark.integration
TABLES = ("captions", "transcripts", "answers", "recordings", "dead_letters")
CLIPS = {
    "siren.flac": "siren.flac",
    "zwei hohe Töne.flac": "zwei hohe Töne.flac",
    "corrupt.flac": "corrupt.flac",
    "digits_four_zero_two_nine.mp3": "a b/take #1.mp3",
    "command_go_back_home_stereo.flac": "a b/100% go%20home + more?&[1].flac",
}
# They name the place, or come from it.
OF_THE_PLACE = (
    *("recording_id", "source_key", "answer_key", "answer_keys", "work_key", "dead_letter_key", "dead_letter_keys"),
    *("etag", "mtime", "run_id", "created_at"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("local")
    (found / "archive" / "a b").mkdir(parents=True)
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        for clip, path in CLIPS.items():
            shutil.copy(clips / clip, found / "archive" / path)
    return found


# README's command has one server of each kind of store; that the other S3 server agrees is for CI.
OFTEN = (S3, "fake-gcs-server")


@pytest.fixture(params=[pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in STORES])
def store(request, tmp_path):
    with store_server(request.param, tmp_path) as found, using(found):
        yield found


def run(archive, output):
    """With a file that is not there, and a question from a manifest beside the archive."""
    return batch.run(
        make_job(
            {
                "inputs": [archive, f"{archive}/missing.flac", f"{archive}/asked.jsonl"],
                "output": output,
                "model": "demo",
                "tasks": ["caption", "transcript"],
                "engine": "echo",
                "decode_guard": False,
            }
        )
    )


def rows(output, archive):
    found = {}
    for table in TABLES:
        held = read_table(f"{output}/{table}").to_pylist()
        found[table] = sorted((without_place(row, archive) for row in held), key=str)
    return found


def without_place(row, archive):
    kept = {key: value for key, value in row.items() if key not in OF_THE_PLACE}
    if "input" in kept:
        kept["input"] = json.loads(kept["input"])
        kept["input"]["recording"] = {
            key: value for key, value in kept["input"]["recording"].items() if key not in OF_THE_PLACE
        }
    return json.loads(json.dumps(kept, default=str).replace(archive, "ARCHIVE"))


@pytest.fixture(scope="module")
def local(folder, engines):
    write_manifest(lambda text: (folder / "archive" / "asked.jsonl").write_text(text))
    report = run(str(folder / "archive"), str(folder / "out"))
    assert report.counts.reconciled, report.counts.problems
    return report, rows(str(folder / "out"), str(folder / "archive"))


def write_manifest(write):
    asked = {"uri": CLIPS["command_go_back_home_stereo.flac"], "question": "Is there speech?"}
    write(f"{json.dumps(asked)}\nnot json\n")


def test_a_run_from_and_to_a_store_gives_the_rows_of_a_local_one(store, folder, local):
    for path in CLIPS.values():
        store.fs.pipe_file(f"archive/in/{path}", (folder / "archive" / path).read_bytes())
    write_manifest(lambda text: store.fs.pipe_file("archive/in/asked.jsonl", text.encode()))
    report = run(store.url("archive/in"), store.url("labels/the out"))
    local_report, local_rows = local
    assert report.counts.reconciled, report.counts.problems
    assert report.counts[:4] == local_report.counts[:4]
    found = rows(store.url("labels/the out"), store.url("archive/in"))
    for table in TABLES:
        assert found[table] == local_rows[table], table
    assert {row["uri"] for row in found["captions"]} == {
        f"ARCHIVE/{path}" for path in CLIPS.values() if path != "corrupt.flac"
    }
