"""The family is read from the checkpoint: nothing in a job says which class a model is."""

from importlib import resources

import pytest

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from tests.checkpoints import tiny_music_flamingo
from tests.integration.runners import rows

pytestmark = pytest.mark.integration


def test_a_local_directory_of_music_flamingo(tmp_path):
    """All other runs are of Audio Flamingo."""
    tiny_music_flamingo(tmp_path / "model")
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        job = make_job(
            {
                "inputs": [str(clips / "siren.flac"), str(clips / "siren_two_windows.flac")],
                "output": str(tmp_path / "out"),
                "model": str(tmp_path / "model"),
                "tasks": ["caption", "transcript"],
                "max_new_tokens": 8,
                "device": "cpu",
                "decode_guard": False,
            }
        )
        report = batch.run(job)
    assert report.counts.states == {"ok": 2}
    captions = rows(tmp_path / "out", "captions")
    assert {row["family"] for row in captions} == {"MusicFlamingo"}
    assert all("tell me the genre, tempo, and key" in row["prompt"] for row in captions)
    assert {row["audio_tokens"] for row in captions} == {68, 750 + 75}  # 272 mel frames; a full window and 3 s
    assert all(row["model_revision"].startswith("sha256:") for row in captions)
