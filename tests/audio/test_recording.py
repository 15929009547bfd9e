import io

import numpy as np
import pytest

from af3pipe.audio.decode import decode
from af3pipe.audio.levels import measure
from af3pipe.audio.recording import read_segments
from af3pipe.audio.segments import AudioLimits
from af3pipe.schemas import ROUNDING_S, Reason, Recording, Rejected, Stage
from tests import fixtures_audio as make
from tests.audio import as_librosa

RATE = 16000
LIMITS = AudioLimits(sample_rate=RATE, max_samples=4 * RATE, min_samples=480, window_samples=RATE)
POLICIES = ["dead-letter", "truncate", "split"]


def segments(data, policy, **asked):
    recording = Recording("id", "file.wav", **asked)
    return list(read_segments(io.BytesIO(data), recording, limits=LIMITS, over_length=policy))


def rejection(data, policy="dead-letter", **asked):
    with pytest.raises(Rejected) as caught:
        segments(data, policy, **asked)
    return caught.value


def bounds(found):
    return [(piece.segment_index, piece.start_s, piece.end_s, piece.is_last) for piece in found]


class CountingFile(io.BytesIO):
    bytes_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.bytes_read += len(data)
        return data


LONG = make.wav(make.sound(10.5, 44100), 44100)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("encode", [make.wav, make.flac, make.mp3, make.ogg, make.m4a])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_recording_exactly_at_the_cap_is_one_whole_segment(policy, encode, rate):
    [found] = segments(make.encoded(encode, 4, rate), policy)
    assert bounds([found]) == [(0, 0.0, 4.0, True)]
    assert found.samples.shape == (4 * RATE,)
    assert found.info.duration_s == pytest.approx(4.0, abs=0.03)


@pytest.mark.parametrize("encode", [make.wav, make.flac, make.mp3, make.m4a])
def test_over_length_is_known_before_the_body_is_read(encode):
    file = CountingFile(make.encoded(encode, 120, 16000))
    with pytest.raises(Rejected) as caught:
        next(read_segments(file, Recording("id", "file"), limits=LIMITS, over_length="dead-letter"))
    assert (caught.value.stage, caught.value.reason) == (Stage.PROBE, Reason.TOO_LONG)
    assert caught.value.detail == (
        "The recording lasts 120.0 s by its header; the model takes 4 s; choose --over-length truncate or split."
    )
    assert file.bytes_read < 0.35 * len(file.getvalue())


@pytest.mark.parametrize("encode", [make.mp3_without_length, make.adts])
def test_over_length_that_no_header_states_stops_the_decoding_at_the_cap(encode):
    file = CountingFile(make.encoded(encode, 80, 44100))
    with pytest.raises(Rejected) as caught:
        list(read_segments(file, Recording("id", "file"), limits=LIMITS, over_length="dead-letter"))
    assert (caught.value.stage, caught.value.reason) == (Stage.DECODE, Reason.TOO_LONG)
    assert "states no length, but more than 4 s" in caught.value.detail
    assert file.bytes_read < 0.4 * len(file.getvalue())


def test_a_header_that_states_too_little_is_caught_while_decoding():
    joined = make.ogg(make.sound(30, 16000), 16000) + make.ogg(make.sound(2, 16000), 16000)
    rejected = rejection(joined)
    assert (rejected.stage, rejected.reason) == (Stage.DECODE, Reason.TOO_LONG)
    assert "states" in rejected.detail


def test_truncate_gives_one_segment_that_is_recognisably_partial():
    [found] = segments(LONG, "truncate")
    assert bounds([found]) == [(0, 0.0, 4.0, True)]
    assert found.info.duration_s == 10.5


def test_truncate_of_an_unknown_length_states_more_than_it_covers():
    [found] = segments(make.mp3_without_length(make.sound(30, 44100), 44100), "truncate")
    assert found.samples.shape == (4 * RATE,)
    assert found.info.duration_s > 4 + ROUNDING_S


def test_split_covers_everything_in_consecutive_segments():
    found = segments(LONG, "split")
    assert bounds(found) == [(0, 0.0, 4.0, False), (1, 4.0, 8.0, False), (2, 8.0, 10.5, True)]
    whole = np.concatenate(list(decode(io.BytesIO(LONG), sample_rate=RATE)))
    np.testing.assert_array_equal(np.concatenate([piece.samples for piece in found]), whole)
    assert found[-1].info.duration_s == 10.5


@pytest.mark.parametrize("policy", POLICIES)
def test_a_remainder_without_an_audio_token_is_no_segment_and_not_over_length(policy):
    [found] = segments(make.wav(make.sound(4.02, RATE), RATE), policy)
    assert bounds([found]) == [(0, 0.0, 4.0, True)]
    assert found.info.duration_s == 4.02


@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_range_asked_for_counts(policy):
    [found] = segments(LONG, policy, offset_s=6.0, duration_s=4.0)
    assert bounds([found]) == [(0, 6.0, 10.0, True)]
    assert found.info.duration_s == 10.5  # of the object, which is longer
    [found] = segments(LONG, policy, offset_s=7.25)
    assert bounds([found]) == [(0, 7.25, 10.5, True)]
    assert found.info.duration_s == 10.5


def test_a_range_longer_than_the_cap_is_over_length():
    rejected = rejection(LONG, offset_s=2.0, duration_s=5.0)
    assert "5.0 s are requested of a recording that lasts 10.5 s" in rejected.detail
    assert bounds(segments(LONG, "truncate", offset_s=2.0, duration_s=5.0)) == [(0, 2.0, 6.0, True)]
    split = segments(LONG, "split", offset_s=2.0, duration_s=5.0)
    assert bounds(split) == [(0, 2.0, 6.0, False), (1, 6.0, 7.0, True)]


def test_the_last_segment_states_the_decoded_length_even_where_the_header_states_none():
    [found] = segments(make.mp3_without_length(make.sound(3, 44100), 44100), "dead-letter", offset_s=1.0)
    assert found.info.duration_s == pytest.approx(3, abs=0.1)
    assert found.end_s == pytest.approx(found.info.duration_s, abs=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [0, 1, 479])
def test_too_little_for_one_audio_token_is_rejected(policy, count):
    rejected = rejection(make.wav(make.sound(1, RATE)[:count], RATE), policy)
    assert (rejected.stage, rejected.reason) == (Stage.DECODE, Reason.TOO_SHORT)
    assert f"{count} samples" in rejected.detail
    assert "480 (0.030 s)" in rejected.detail


def test_the_shortest_that_can_be_answered_is_answered():
    assert segments(make.wav(make.sound(1, RATE)[:480], RATE), "dead-letter")[0].samples.shape == (480,)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_offset_beyond_the_end_is_too_short(policy):
    rejected = rejection(LONG, policy, offset_s=11.0)
    assert (rejected.stage, rejected.reason) == (Stage.DECODE, Reason.TOO_SHORT)
    assert "11.000 s" in rejected.detail
    assert "10.500 s" in rejected.detail


def test_split_gives_what_lies_before_the_break_and_then_says_so():
    reading = read_segments(
        io.BytesIO(LONG[: int(len(LONG) * 0.9)]), Recording("id", "file"), limits=LIMITS, over_length="split"
    )
    assert next(reading).end_s == 4.0
    with pytest.raises(Rejected) as caught:
        list(reading)
    assert caught.value.reason is Reason.DECODE_SHORT


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_samples_beyond_full_scale_are_passed_on_as_they_are(rate):
    data = make.wav(8 * make.sound(2, rate, 2), rate, "FLOAT")
    [found] = segments(data, "dead-letter")
    expected = as_librosa.load(data, RATE)
    assert np.abs(expected).max() > 1.5
    np.testing.assert_allclose(found.samples, expected, rtol=0, atol=1e-5)
    assert found.levels == measure(found.samples)
    assert found.levels.peak_dbfs > 3.5
    assert 0.01 < found.levels.clipped_share < 0.5


def test_levels_are_of_what_the_model_hears_and_not_of_the_file():
    opposite = make.sound(2, 44100)[:, 0]
    [found] = segments(make.wav(np.stack([opposite, -opposite], axis=1), 44100, "FLOAT"), "dead-letter")
    assert found.levels.silent  # two channels that cancel each other, as a wrongly wired cable makes them
    [found] = segments(make.wav(make.sound(2, 44100), 44100), "dead-letter", offset_s=1.0)
    assert found.levels == measure(found.samples)
    assert not found.levels.silent


def test_every_segment_has_levels_of_its_own():
    tape = np.concatenate([make.sound(4, RATE), np.zeros((4 * RATE, 1), np.float32), make.sound(1, RATE) / 1000])
    found = segments(make.wav(tape, RATE, "FLOAT"), "split")
    assert [segment.levels.silent for segment in found] == [False, True, True]
