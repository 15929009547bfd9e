"""Where real speech is cut: in its pauses."""

import functools
import importlib.resources
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from af3pipe.audio.decode import decode
from af3pipe.audio.recording import read_segments
from af3pipe.audio.segments import AudioLimits
from af3pipe.schemas import Recording
from tests import fixtures_audio as make

RATE = 16000
LIMITS = AudioLimits(sample_rate=RATE, max_samples=30 * RATE, min_samples=480, window_samples=30 * RATE)
HUMAN = Path("/usr/share/asterisk/sounds/en_US_f_Allison/digits")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def segments(data, tolerance_s, policy="split", limits=LIMITS):
    recording = Recording("id", "tape.flac")
    found = read_segments(
        io.BytesIO(data), recording, limits=limits, over_length=policy, split_tolerance_s=tolerance_s
    )
    return list(found)


def cuts(found):
    return [segment.start_s for segment in found[1:]]


@functools.cache
def human_word(number):
    """One digit as a woman says it, without the silence around it."""
    samples, rate = soundfile.read(str(HUMAN / f"{number}.wav"), dtype="float32")
    samples = soxr.resample(samples, rate, RATE)
    (loud,) = np.nonzero(np.abs(samples) > 0.01)
    return samples[loud[0] : loud[-1]].astype(np.float32)


def tape(words, seed=0):
    """Words with pauses of 0.3 to 0.8 s of room noise between them, and where each word begins and ends, in s."""
    rng = np.random.default_rng(seed)
    parts, spans, end = [], [], 0
    for word in words:
        pause = rng.normal(0, 0.001, rng.integers(int(0.3 * RATE), int(0.8 * RATE)))
        parts += [pause.astype(np.float32), word]
        start, end = end + len(pause), end + len(pause) + len(word)
        spans.append((start / RATE, end / RATE))
    return np.concatenate(parts), spans


def cut_in_two(words, found):
    return [span for span in words for cut_s in cuts(found) if span[0] < cut_s < span[1]]


@pytest.mark.skipif(not HUMAN.exists(), reason="needs Debian's asterisk-core-sounds-en-wav")
@pytest.mark.parametrize("encode", [make.flac, pytest.param(make.mp3, marks=pytest.mark.slow)])
def test_no_word_of_a_human_voice_is_cut(encode):
    rng = np.random.default_rng(1)
    words = [human_word(number) for number in rng.integers(0, 10, 400)]
    samples, spans = tape(words)
    data = encode(samples[:, None], RATE)
    assert len(cut_in_two(spans, segments(data, 0))) > 3  # at the cap itself, words are
    found = segments(data, 5.0)
    assert cut_in_two(spans, found) == []
    assert all(25 <= segment.audio_s <= 30 for segment in found[:-1])


@functools.cache
def demo_speech():
    """The speech among the demo's clips, as it is in them: pauses between words, and consonants that stop."""
    clips = importlib.resources.files("af3pipe.demo") / "clips"
    names = ["command_open_door.flac", "digits_seven_three_one.flac", "digits_four_zero_two_nine.mp3"]
    return [np.concatenate(list(decode(io.BytesIO((clips / name).read_bytes()), sample_rate=RATE))) for name in names]


def test_synthetic_speech_is_cut_where_nothing_is_heard():
    samples, _ = tape(demo_speech() * 30)
    found = segments(make.flac(samples[:, None], RATE), 5.0)
    assert len(found) > 6
    for cut_s in cuts(found):
        around = samples[round((cut_s - 0.1) * RATE) : round((cut_s + 0.1) * RATE)]
        assert np.abs(around).max() < 0.01, cut_s


@pytest.mark.parametrize("tolerance_s", [0.0, 5.0, 1000.0, float("inf")])
def test_whatever_is_cut_joins_to_the_whole(tolerance_s):
    data = make.encoded(make.flac, 100, 44100)
    found = segments(data, tolerance_s)
    whole = np.concatenate(list(decode(io.BytesIO(data), sample_rate=RATE)))
    np.testing.assert_array_equal(np.concatenate([segment.samples for segment in found]), whole)
    assert [segment.end_s for segment in found[:-1]] == cuts(found)
    assert (found[0].start_s, found[-1].end_s, found[-1].info.duration_s) == (0.0, 100.0, 100.0)
    assert all(max(30 - tolerance_s, 15) <= segment.audio_s <= 30 for segment in found[:-1])
    assert sum(segment.audio_s for segment in found) == pytest.approx(100)


def test_a_tone_without_end_is_cut_at_the_cap():
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(100 * RATE) / RATE)).astype(np.float32)
    assert cuts(segments(make.flac(tone[:, None], RATE), 15.0)) == [30.0, 60.0, 90.0]


def test_only_split_looks_for_silence():
    samples, _ = tape(demo_speech() * 8)
    data = make.flac(samples[:, None], RATE)
    [found] = segments(data, 15.0, policy="truncate")
    assert found.audio_s == 30


def test_the_shortest_remainder_there_can_be_is_still_answered():
    samples = make.sound(30.03, RATE)
    samples[29 * RATE : round(29.8 * RATE)] = 0
    found = segments(make.flac(samples, RATE), 15.0)
    assert cuts(found) == [pytest.approx(29.4, abs=0.06)]
    samples = make.sound(30.029, RATE)  # no audio token in what goes beyond the cap: not over-length
    assert cuts(segments(make.flac(samples, RATE), 15.0)) == []
