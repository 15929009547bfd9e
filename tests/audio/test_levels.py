import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from af3pipe.audio.levels import FLOOR_DBFS, FULL_SCALE, combine, measure, quietest_point
from af3pipe.schemas import Levels

RATE = 16000


def decibels(power):
    return max(10 * math.log10(power), FLOOR_DBFS) if power else FLOOR_DBFS


def oracle(samples, silent_below_dbfs=-60.0):
    """One sample at a time, in exact sums."""
    wide = [float(sample) for sample in samples]
    peak_dbfs = decibels(max(abs(sample) for sample in wide) ** 2)
    return Levels(
        peak_dbfs,
        decibels(math.fsum(sample * sample for sample in wide) / len(wide)),
        sum(abs(sample) >= FULL_SCALE for sample in wide) / len(wide),
        peak_dbfs <= silent_below_dbfs,
    )


def test_a_square_wave_of_full_scale_is_the_measure_of_all():
    square = np.sign(np.sin(2 * np.pi * 100 * (np.arange(RATE) + 0.5) / RATE)).astype(np.float32)
    assert measure(square) == Levels(0.0, 0.0, 1.0, False)
    assert measure(square / 10) == pytest.approx((-20.0, -20.0, 0.0, False), abs=1e-5)


def test_a_sine_is_3_db_below_its_peak():
    sine = (0.5 * np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE)).astype(np.float32)
    assert measure(sine) == pytest.approx((-6.02, -9.03, 0.0, False), abs=0.01)


@pytest.mark.parametrize("samples", [np.zeros(1), np.zeros(100_000), np.full(9, 1e-30), np.full(9, -1e-7)])
def test_digital_silence_has_the_floor_so_that_every_column_is_finite(samples):
    assert measure(samples.astype(np.float32)) == Levels(-120.0, -120.0, 0.0, True)


@given(
    npst.arrays(np.float32, st.integers(1, 300), elements=st.floats(-4, 4, width=32)),
    st.sampled_from([1e-30, 1e-4, 0.1, 1]),
    st.floats(-120, -1),
)
def test_equals_the_oracle(samples, gain, silent_below_dbfs):
    samples = samples * np.float32(gain)
    assert measure(samples, silent_below_dbfs=silent_below_dbfs) == pytest.approx(oracle(samples, silent_below_dbfs))


def test_equals_the_oracle_over_many_chunks():
    samples = np.random.default_rng(0).normal(0, 0.4, 200_001).astype(np.float32)
    assert measure(samples) == pytest.approx(oracle(samples), rel=1e-12)
    assert 0.01 < measure(samples).clipped_share < 0.02


def test_clipped_is_what_16_bit_pcm_cannot_exceed():
    samples = np.array([32767, 32766, -32768, -32767, -32766, 0], np.int16)
    assert measure(samples / np.float32(32768)).clipped_share == 0.5


def test_silence_is_what_peaks_at_the_threshold_or_below():
    click = np.zeros(RATE, np.float32)
    click[5] = -0.00099999  # just below -60 dBFS
    assert measure(click).silent
    assert not measure(click, silent_below_dbfs=-61).silent
    click[5] = -0.00100001
    assert not measure(click).silent


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(0, 99), st.randoms())
def test_pieces_combine_to_the_whole(lengths, seed, order):
    rng = np.random.default_rng(seed)
    pieces = [rng.normal(0, rng.choice([1e-4, 0.1, 1]), length).astype(np.float32) for length in lengths]
    parts = [(len(piece) / RATE, measure(piece)) for piece in pieces]
    combined = combine(parts)
    assert combined == pytest.approx(measure(np.concatenate(pieces)))
    order.shuffle(parts)
    assert combine(parts) == combined


@given(npst.arrays(np.float32, st.integers(0, 3000), elements=st.floats(-2, 2, width=32)), st.sampled_from([1, 100]))
def test_there_is_always_somewhere_to_cut(samples, rate):
    found = quietest_point(samples, rate)
    assert min(len(samples), 1) <= found <= len(samples)


def noise(seconds, loudness=0.1, seed=0):
    return np.random.default_rng(seed).normal(0, loudness, round(seconds * RATE)).astype(np.float32)


def test_the_cut_is_in_the_middle_of_the_pause():
    samples = np.concatenate([noise(6), noise(1, 0.001), noise(8)])
    assert abs(quietest_point(samples, RATE) / RATE - 6.5) < 0.4
    digital = np.concatenate([noise(6), noise(1, 0), noise(8)])
    assert abs(quietest_point(digital, RATE) / RATE - 6.5) <= 0.05


def test_of_pauses_that_are_equally_quiet_the_last_one_counts():
    samples = np.concatenate([noise(3), noise(2, 0), noise(3), noise(0.5, 0), noise(3)])
    assert abs(quietest_point(samples, RATE) / RATE - 8.25) <= 0.05


def test_the_stop_of_a_consonant_is_no_pause():
    word = np.concatenate([noise(2), noise(0.08, 0), noise(2)])
    samples = np.concatenate([noise(3), noise(0.4, 0.002), word])
    assert abs(quietest_point(samples, RATE) / RATE - 3.2) < 0.15


@pytest.mark.parametrize(
    "samples",
    [
        np.sin(np.arange(15 * RATE) * 0.1).astype(np.float32),
        noise(15),
        noise(15, 0),
        noise(0.45),
        noise(0),
        noise(5) * np.repeat([1, 0.6], 2.5 * RATE).astype(np.float32),
    ],
    ids=["tone", "noise", "silence", "short", "nothing", "a swell"],
)
def test_where_nothing_stands_out_the_cut_is_at_the_end(samples):
    assert quietest_point(samples, RATE) == len(samples)
