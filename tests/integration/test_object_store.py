"""From an S3 server to an S3 server: listing, reading and writing go over HTTP, and nothing is patched."""

from importlib import resources

import fsspec
import numpy as np
import pyarrow.dataset as ds
import pytest

from af3pipe import storage
from af3pipe.audio.probe import probe
from af3pipe.models import open_checkpoint
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import JobError, make_job
from af3pipe.schemas import Rejected
from af3pipe.transforms.decode import open_segments
from af3pipe.transforms.read import list_recordings
from tests import fixtures_audio as make
from tests.integration.runners import free_port, serving

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "server.log"
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch, serving("moto.server", port, f"-p{port}", log=log):
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        found = fsspec.filesystem("s3")
        for bucket in ("archive", "labels"):
            found.mkdir(bucket)
        with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
            for name in ("siren.flac", "zwei hohe Töne.flac", "digits_four_zero_two_nine.mp3", "corrupt.flac"):
                found.put_file(str(clips / name), f"archive/a b/{name}")
        yield found
        found.clear_instance_cache()


def job(**changes):
    values = {
        "inputs": ["s3://archive/**"],
        "output": "s3://labels/out",
        "model": "demo",
        "tasks": ["transcript"],
        "max_new_tokens": 16,
        "device": "cpu",
    }
    return make_job(values | changes)


def test_a_run_from_s3_to_s3(s3):
    report = batch.run(job())
    assert report.counts.states == {"ok": 3, "dead_letter": 1}
    assert report.counts.reconciled, report.counts.problems
    table = ds.dataset("labels/out/transcripts", format="parquet", filesystem=s3).to_table().to_pylist()
    heard = {row["uri"]: row["text"] for row in table}
    assert heard["s3://archive/a b/digits_four_zero_two_nine.mp3"] == "four zero two nine"
    assert "s3://archive/a b/zwei hohe Töne.flac" in heard
    assert all(row["etag"] and row["size_bytes"] for row in table)


def test_a_bucket_that_does_not_exist_is_no_place_to_write(s3):
    with pytest.raises(JobError, match=r"output: .*s3://nowhere/out is not writable"):
        batch.run(job(output="s3://nowhere/out"))


def test_over_length_on_a_store_is_known_from_its_first_bytes(s3):
    s3.pipe_file("archive/long.wav", make.wav(np.zeros((16_000 * 700, 1), np.float32), 16_000))
    (recording,) = list_recordings("s3://archive/long.wav")
    assert recording.size_bytes > 20 * 2**20
    with storage.open_input(recording.uri, size_bytes=recording.size_bytes) as file:
        assert probe(file).duration_s == 700
        assert file.raw._handle.cache.total_requested_bytes <= 2 * 2**20  # fsspec's own account of its ranges
    with pytest.raises(Rejected, match=r"lasts 700.0 s by its header"):
        next(open_segments(recording, limits=open_checkpoint("demo").limits))
