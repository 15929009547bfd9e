"""Everything that can be wrong with a recording, in one run: each with its reason, none lost."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from af3pipe.models import ModelError, open_checkpoint
from af3pipe.pipelines import batch
from af3pipe.pipelines.beam_flags import beam_options
from af3pipe.pipelines.job import JobError, make_job
from af3pipe.schemas import Reason, Recording, Rejected
from af3pipe.transforms.decode import open_segments
from af3pipe.transforms.inputs.read import list_recordings
from tests import fixtures_audio as make
from tests.integration.runners import rows

pytestmark = pytest.mark.integration
RATE = 16000


def cut(data, share=0.5):
    return data[: int(len(data) * share)]


def with_value(value):
    samples = make.sound(2, RATE)
    samples[RATE] = value
    return make.wav(samples, RATE, "FLOAT")


# Name of the file: what makes it, the reason expected, words expected in the detail.
BAD = {
    "empty.wav": (lambda: b"", "empty_file", "0 bytes"),
    "text.wav": (lambda: b"Dear diary, today I am a recording.", "unsupported_format", "No decoder knows"),
    "truncated.wav": (lambda: cut(make.wav(make.sound(9, RATE), RATE)), "decode_short", "states 9.0 s"),
    "truncated.flac": (lambda: cut(make.flac(make.sound(9, RATE), RATE)), "decode_short", "states 9.0 s"),
    "truncated.mp3": (lambda: cut(make.mp3(make.sound(9, RATE), RATE)), "decode_short", "states 9.0 s"),
    "mute.mp4": (lambda: make.mp4_video(None), "no_audio_stream", "no audio"),
    "no_samples.wav": (lambda: make.wav(make.sound(0, RATE), RATE), "too_short", "0"),
    "20_ms.wav": (lambda: make.wav(make.sound(0.02, RATE), RATE), "too_short", "0.02"),
    "nan.wav": (lambda: with_value(np.nan), "decode_error", "NaN"),
    "infinite.wav": (lambda: with_value(np.inf), "decode_error", "infinite"),
    "over_length.wav": (lambda: make.wav(make.sound(61, 8000), 8000), "too_long", "61.0 s by its header"),
    "lying_header.ogg": (
        lambda: make.ogg(make.sound(70, 8000), 8000) + make.ogg(make.sound(2, 8000), 8000),
        "too_long",
        "60 s",
    ),
}
GOOD = {
    "fine.wav": lambda: make.wav(make.sound(1, RATE), RATE),
    "Grüße aus Köln.m4a": lambda: make.m4a(make.sound(2, 44100, 2), 44100),
    "spoken [1] #2?.webm": lambda: make.webm(make.sound(2, 48000)),
    "clip.mp4": lambda: make.mp4_video(make.sound(2, 44100)),
}


@contextlib.contextmanager
def nobody():
    """Root reads everything; a test about permissions has to be somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def let_in(folder):
    """Lets anybody through to a folder: pytest makes its own for their owner alone."""
    for each in (folder, *folder.parents):
        if each.stat().st_mode & 0o005 != 0o005:
            each.chmod(0o755)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, engines):
    folder = tmp_path_factory.mktemp("bad")
    for name, content in GOOD.items() | {(name, content) for name, (content, *_) in BAD.items()}:
        (folder / name).write_bytes(content())
    missing = str(folder / "not" / "there.wav")
    manifest = folder / "more.jsonl"
    lines = [json.dumps({"uri": "gone.flac"}), json.dumps({"uri": "fine.wav", "offset": -1}), "{oops"]
    manifest.write_text("\n".join(lines))
    output = tmp_path_factory.mktemp("out")
    report = batch.run(
        make_job(
            {
                "inputs": [str(folder / "*"), missing, str(manifest)],
                "output": str(output),
                "model": str(model),
                "tasks": ["caption"],
                "engine": "constant",
            }
        )
    )
    letters = {Path(row["uri"]).name: row for row in rows(output, "dead_letters")}
    return output, report, letters


@pytest.mark.parametrize("name", BAD)
def test_reason_and_detail(finished, name):
    _, reason, words = BAD[name]
    letter = finished[2][name]
    assert letter["reason"] == reason, letter["detail"]
    assert words in letter["detail"]
    assert letter["traceback"] is None  # each is a known case; a traceback would say that it surprised us
    assert json.loads(letter["input"])["recording"]["uri"].endswith(name)


def test_what_does_not_exist_is_a_dead_letter(finished):
    letter = finished[2]["there.wav"]
    assert (letter["stage"], letter["reason"]) == ("list", "not_found")
    letter = finished[2]["gone.flac"]
    assert (letter["stage"], letter["reason"]) == ("read", "not_found")


def test_bad_manifest_rows_are_dead_letters_with_their_number(finished):
    letters = [row for row in finished[2].values() if "line=" in row["uri"]]
    assert sorted(row["uri"].rpartition("=")[2] for row in letters) == ["2", "3"]
    assert "offset is -1" in " ".join(row["detail"] for row in letters)


def test_the_others_are_answered_whatever_their_names(finished):
    output, _, _ = finished
    answered = {Path(row["uri"]).name for row in rows(output, "captions")}
    # The glob also matches the manifest, which is read as what it is when it is named, and here as a recording.
    assert answered == set(GOOD)


def test_everything_found_has_one_state(finished):
    _, report, letters = finished
    assert report.counts.reconciled, report.counts.problems
    assert report.counts.states == {"ok": len(GOOD), "dead_letter": len(letters)}
    assert report.counts.found == len(GOOD) + len(letters)


def job(tmp_path, **changes):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "a.wav").write_bytes(GOOD["fine.wav"]())
    values = {
        "inputs": [str(tmp_path / "in")],
        "output": str(tmp_path / "out"),
        "model": "demo",
        "tasks": ["caption"],
        "max_new_tokens": 4,
        "device": "cpu",
        "decode_guard": False,
    }
    return make_job(values | changes)


def test_what_may_not_be_read_is_rejected_and_says_so(tmp_path):
    limits = open_checkpoint("demo").limits
    fine, secret = tmp_path / "fine.wav", tmp_path / "secret.wav"
    for path in (fine, secret):
        path.write_bytes(GOOD["fine.wav"]())
    secret.chmod(0)
    let_in(tmp_path)
    assert list(open_segments(Recording("fine", str(fine)), limits=limits))  # and all that is imported late, is now
    with nobody():
        (found,) = list_recordings(str(secret))
        with pytest.raises(Rejected) as caught:
            list(open_segments(found, limits=limits))
    assert caught.value.reason is Reason.PERMISSION_DENIED
    assert "secret.wav" in caught.value.detail


@pytest.mark.parametrize("name", ["*.nothing", "missing.wav", "no/such/folder", "in/*.flac"])
def test_no_input_matched(tmp_path, name):
    with pytest.raises(JobError, match="no input matched"):
        batch.run(job(tmp_path, inputs=[str(tmp_path / name)]))


def test_a_manifest_that_cannot_be_read_does_not_pass_for_one_dead_letter(tmp_path):
    wanted = job(tmp_path, inputs=[str(tmp_path / "in"), str(tmp_path / "gone.csv")])
    with pytest.raises(JobError, match=r"input .*gone\.csv: "):
        batch.run(wanted)


def test_a_folder_that_may_not_be_listed_does_not_pass_for_one_dead_letter(tmp_path):
    wanted = job(tmp_path)
    let_in(tmp_path)
    (tmp_path / "in").chmod(0)
    options = beam_options(wanted)
    with nobody(), pytest.raises(JobError, match=r"input .*/in: "):
        batch.preflight(wanted, options)


def test_an_output_that_cannot_be_written_fails_before_any_model_is_looked_for(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JobError, match=r"output: .*file/out is not writable"):
        batch.run(job(tmp_path, output=str(tmp_path / "file" / "out"), model=str(tmp_path / "no model")))


def test_an_unknown_model_directory(tmp_path):
    with pytest.raises(ModelError, match="no_model"):
        batch.run(job(tmp_path, model=str(tmp_path / "no_model")))


def test_a_model_that_cannot_be_loaded_ends_the_job_and_is_no_dead_letter(tmp_path, model):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    with pytest.raises(batch.RunFailed, match=r"broken.*weights cannot be loaded"):
        batch.run(job(tmp_path, model=str(broken)))
    assert rows(tmp_path / "out", "dead_letters") == []


def test_a_request_that_breaks_the_model_costs_no_other(tmp_path, monkeypatch):
    from af3pipe.models.encoder import AudioEncoder

    wanted = job(tmp_path)
    for name in ("b", "poisoned", "c"):
        seconds = 3 if name == "poisoned" else 1
        (tmp_path / "in" / f"{name}.wav").write_bytes(make.wav(make.sound(seconds, RATE), RATE))
    encode = AudioEncoder.encode

    def breaks(self, windows, *arguments):
        if any(window.frames == 300 for window in windows):  # 3 s: the poisoned one, whatever is encoded with it
            raise ValueError("these frames are poison")
        return encode(self, windows, *arguments)

    monkeypatch.setattr(AudioEncoder, "encode", breaks)
    report = batch.run(wanted)
    assert report.counts.states == {"ok": 3, "dead_letter": 1}
    (letter,) = rows(tmp_path / "out", "dead_letters")
    assert (letter["stage"], letter["reason"], letter["retryable"]) == ("generate", "engine_error", True)
    assert letter["uri"].endswith("poisoned.wav")
    assert "these frames are poison" in letter["detail"]
    assert "breaks" in letter["traceback"]
    assert json.loads(letter["input"])["tasks"][0]["name"] == "caption"


def test_a_model_that_only_the_workers_have_does_not_stop_the_launcher(tmp_path, caplog):
    wanted = job(tmp_path, model=str(tmp_path / "baked_into_the_image"))
    elsewhere = beam_options(wanted, ["--runner=PrismRunner", "--environment_type=EXTERNAL"])
    assert batch.preflight(wanted, elsewhere) is None
    assert "only the workers can check it" in caplog.text
