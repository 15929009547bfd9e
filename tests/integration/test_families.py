"""The family is read from the checkpoint: nothing in a job says which class a model is."""

from importlib import resources

import pytest

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from tests.checkpoints import tiny_audio_flamingo, tiny_music_flamingo
from tests.integration.runners import rows

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("make", "family", "words"),
    [
        (tiny_audio_flamingo, "AudioFlamingo3", "Describe the audio in detail."),
        (tiny_music_flamingo, "MusicFlamingo", "tell me the genre, tempo, and key"),
    ],
    ids=lambda found: found if isinstance(found, str) else "",
)
def test_a_local_directory_of_either_family(make, family, words, tmp_path):
    make(tmp_path / "model")
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        job = make_job(
            {
                "inputs": [str(clips / "siren.flac"), str(clips / "siren_two_windows.flac")],
                "output": str(tmp_path / "out"),
                "model": str(tmp_path / "model"),
                "tasks": ["caption", "transcript"],
                "max_new_tokens": 8,
                "device": "cpu",
            }
        )
        report = batch.run(job)
    assert report.counts.states == {"ok": 2}
    captions = rows(tmp_path / "out", "captions")
    assert {row["family"] for row in captions} == {family}
    assert all(words in row["prompt"] for row in captions)
    assert {row["audio_tokens"] for row in captions} == {68, 750 + 75}  # 272 mel frames; a full window and 3 s
    assert all(row["model_revision"].startswith("sha256:") for row in captions)
