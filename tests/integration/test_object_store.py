"""From an S3 server to an S3 server: listing, reading and writing go over HTTP, and nothing is patched."""

import json
import os
import urllib.request
from importlib import resources

import numpy as np
import pytest

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import JobError, make_job
from tests import fixtures_audio as make
from tests.integration.servers import s3_by_environment
from tests.read_tables import read_table

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("engines")]


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_by_environment(tmp_path_factory.mktemp("s3"), "archive", "labels") as found:
        with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
            for name in ("siren.flac", "zwei hohe Töne.flac", "digits_four_zero_two_nine.mp3", "corrupt.flac"):
                found.put_file(str(clips / name), f"archive/a b/{name}")
        yield found


def job(**changes):
    values = {
        "inputs": ["s3://archive/**"],
        "output": "s3://labels/out",
        "model": "demo",
        "tasks": ["transcript"],
        "engine": "constant",
        "decode_guard": False,
    }
    return make_job(values | changes)


def test_a_run_from_s3_to_s3(s3):
    report = batch.run(job())
    assert report.counts.states == {"ok": 3, "dead_letter": 1}
    assert report.counts.reconciled, report.counts.problems
    table = read_table("s3://labels/out/transcripts").to_pylist()
    names = ("siren.flac", "zwei hohe Töne.flac", "digits_four_zero_two_nine.mp3")
    assert {row["uri"] for row in table} == {f"s3://archive/a b/{name}" for name in names}
    assert all(row["etag"] and row["size_bytes"] for row in table)


def test_a_bucket_that_does_not_exist_is_no_place_to_write(s3):
    with pytest.raises(JobError, match=r"output: .*s3://nowhere/out is not writable"):
        batch.run(job(output="s3://nowhere/out"))


LONG = {
    "long.wav": lambda: make.wav(np.zeros((16_000 * 1800, 1), np.float32), 16_000),
    "long.flac": lambda: make.flac(np.tile(make.sound(60, 16_000), (30, 1)), 16_000),
    "cover.mp3": lambda: make.id3(make.picture(8 << 20)) + make.mp3(np.tile(make.sound(60, 16_000), (30, 1)), 16_000),
    "index at the end.m4a": lambda: make.alac(np.tile(make.sound(60, 16_000), (30, 1)), 16_000, index_at_end=True),
    "call.g722": lambda: bytes(range(256)) * (8000 * 1800 // 256),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "call.g722" else pytest.mark.slow) for name in LONG]
)
def test_what_is_too_long_is_a_dead_letter_without_being_downloaded(s3, name, tmp_path):
    data = LONG[name]()
    assert len(data) > 7 << 20
    s3.pipe_file(f"archive/{name}", data)
    report = batch.run(job(inputs=[f"s3://archive/{name}"], output=str(tmp_path)))
    assert report.counts.dead_letters == {"too_long": 1}
    assert report.counts.reconciled, report.counts.problems
    assert 0 < sent(f"/archive/{name}") <= 1 << 20
    s3.rm_file(f"archive/{name}")


def sent(path):
    """Bytes of an object that the server has sent, by its own account."""
    with urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"] + "/_sent") as response:
        return json.load(response).get(path, 0)
