"""Silence in a run: flagged, or left unasked with every second accounted for."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from tests import fixtures_audio as make
from tests.integration.runners import rows

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("engines")]
RATE = 16000


@functools.cache
def sound():
    return make.sound(60, RATE)


def silence(seconds):
    return np.zeros((seconds * RATE, 1), np.float32)


# Of the model's cap, 60 s. Name: its samples, whether its segments are silent, and the state without silence.
TAPES = {
    "sound.flac": (lambda: sound()[: 2 * RATE], [False], "ok"),
    "silent.flac": (lambda: silence(2), [True], "dead_letter"),
    "ends_silent.flac": (lambda: np.concatenate([sound(), silence(5)]), [False, True], "ok_partial"),
    "begins_silent.flac": (lambda: np.concatenate([silence(60), sound()[: 5 * RATE]]), [True, False], "ok_partial"),
    "all_silent.flac": (lambda: silence(65), [True, True], "dead_letter"),
    # No header states its length: that a segment is the last one is known only when decoding ends.
    "stream.mp3": (lambda: silence(3), [True], "dead_letter"),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tapes")
    for name, (samples, *_) in TAPES.items():
        encode = make.mp3_without_length if name.endswith("mp3") else make.flac
        (folder / name).write_bytes(encode(samples(), RATE))
    return folder


def finish(archive, model, output, **changes):
    values = {
        "inputs": [str(archive)],
        "output": str(output),
        "model": str(model),
        "tasks": ["caption", "transcript"],
        "over_length": "split",
        "engine": "constant",
        "decode_guard": False,
    }
    return batch.run(make_job(values | changes))


@pytest.fixture(scope="module")
def unasked(archive, model, engines, tmp_path_factory):
    output = tmp_path_factory.mktemp("unasked")
    return output, finish(archive, model, output, on_silent="dead-letter")


def test_silence_is_flagged_and_asked_about_unless_told_otherwise(archive, model, tmp_path):
    report = finish(archive, model, tmp_path)
    assert report.counts.reconciled, report.counts.problems
    assert report.counts.states == {"ok": len(TAPES)}
    found = {Path(row["uri"]).name: row for row in rows(tmp_path, "recordings")}
    captions = rows(tmp_path, "captions")
    stitched = {Path(row["uri"]).name: row for row in rows(tmp_path, "transcripts")}
    for name, (_, silent, _) in TAPES.items():
        parts = sorted((row["segment_index"], row["silent"]) for row in captions if row["uri"].endswith(f"/{name}"))
        assert [flag for _, flag in parts] == silent
        assert stitched[name]["silent"] == found[name]["silent"] == all(silent)
        for level in ("peak_dbfs", "rms_dbfs", "clipped_share"):
            assert found[name][level] == pytest.approx(stitched[name][level])
            assert math.isfinite(found[name][level])
    assert (found["silent.flac"]["peak_dbfs"], found["silent.flac"]["rms_dbfs"]) == (-120.0, -120.0)
    # 60 s of sound and 5 s of nothing: the energy is spread over 65.
    (alone,) = [row for row in captions if "ends_silent" in row["uri"] and row["segment_index"] == 0]
    together = alone["rms_dbfs"] + 10 * math.log10(60 / 65)
    assert found["ends_silent.flac"]["rms_dbfs"] == pytest.approx(together, abs=1e-3)
    assert found["ends_silent.flac"]["peak_dbfs"] == alone["peak_dbfs"]


def test_silence_that_is_not_asked_about_is_accounted_for(unasked):
    output, report = unasked
    assert report.counts.reconciled, report.counts.problems
    found = {Path(row["uri"]).name: row for row in rows(output, "recordings")}
    assert {name: row["terminal_state"] for name, row in found.items()} == {
        name: state for name, (*_, state) in TAPES.items()
    }
    assert found["ends_silent.flac"]["covered_s"] == 60
    assert found["begins_silent.flac"]["covered_s"] == 5
    assert found["all_silent.flac"]["covered_s"] == 0
    assert {name: row["dead_letters"] for name, row in found.items()} == {
        name: sum(silent) for name, (_, silent, _) in TAPES.items()
    }
    assert all(row["reasons"] == ["silent"] for row in found.values() if row["dead_letters"])
    assert not any(row["silent"] for row in [*rows(output, "captions"), *rows(output, "transcripts")])
    assert found["begins_silent.flac"]["silent"] is False  # of what was answered for
    assert found["silent.flac"]["peak_dbfs"] is None


def test_every_recording_counts_as_done_once(unasked):
    _, report = unasked
    assert report.metrics["recordings_done"] == report.metrics["recordings_found"] == len(TAPES)
    silent = sum(sum(silent) for _, silent, _ in TAPES.values())
    assert report.metrics["dead_letters_silent"] == silent
    assert report.metrics["segments"] == report.metrics["segments_asked"]
    assert report.metrics["segments"] == sum(len(segments) for _, segments, _ in TAPES.values()) - silent


def test_a_silent_segment_says_how_silent_and_where(unasked):
    output, _ = unasked
    letters = [row for row in rows(output, "dead_letters") if row["uri"].endswith("all_silent.flac")]
    first, second = sorted(letters, key=lambda row: row["position_s"])
    for letter in letters:
        assert (letter["stage"], letter["reason"], letter["retryable"]) == ("decode", "silent", False)
        assert letter["traceback"] is None
        assert "its peak is -120.0 dBFS (RMS -120.0), and up to -60 counts as silence" in letter["detail"]
    assert second["detail"].startswith("60.0 to 65.0 s is silent")
    assert json.loads(first["input"])["segment"] == {"index": 0, "start_s": 0.0, "end_s": 60.0}
    assert json.loads(second["input"])["segment"] == {"index": 1, "start_s": 60.0, "end_s": 65.0}
    assert json.loads(second["input"])["recording"]["uri"] == second["uri"]


def test_the_threshold_is_the_jobs(archive, model, tmp_path):
    report = finish(
        archive, model, tmp_path, inputs=[str(archive / "sound.flac")], on_silent="dead-letter", silent_below=-1
    )
    assert report.counts.dead_letters == {"silent": 1}
    (letter,) = rows(tmp_path, "dead_letters")
    assert "up to -1 counts as silence" in letter["detail"]


def test_a_recording_cut_in_its_pause_gives_one_transcript_with_its_times(model, tmp_path):
    samples = make.sound(70, RATE)
    samples[52 * RATE : 53 * RATE] = 0
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "talk.flac").write_bytes(make.flac(samples, RATE))
    report = finish(tmp_path / "in", model, tmp_path / "out", split_at="silence")
    assert report.counts.states == {"ok": 1}
    (found,) = rows(tmp_path / "out", "transcripts")
    cut_s = found["segments"][0]["end_s"]
    assert cut_s == pytest.approx(52.5, abs=0.06)
    assert [(piece["start_s"], piece["end_s"]) for piece in found["segments"]] == [(0.0, cut_s), (cut_s, 70.0)]
    assert sorted(row["start_s"] for row in rows(tmp_path / "out", "captions")) == [0.0, cut_s]
    (recording,) = rows(tmp_path / "out", "recordings")
    assert (recording["covered_s"], recording["duration_s"]) == (70.0, 70.0)
