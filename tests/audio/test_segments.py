import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.audio.levels import quietest_point
from af3pipe.audio.segments import AudioLimits, Cutter, is_over_length

limits = st.tuples(st.integers(1, 200), st.integers(1, 20)).map(
    lambda pair: AudioLimits(sample_rate=100, max_samples=max(pair), min_samples=min(pair), window_samples=10)
)
tolerances = st.integers(0, 250)
LIMITS = AudioLimits(sample_rate=16000, max_samples=9_600_000, min_samples=480, window_samples=480_000)


def in_blocks(whole, lengths):
    """The same samples in blocks of these lengths, and what is left over as the last one."""
    return np.split(whole, np.minimum(np.cumsum(lengths, dtype=int), len(whole)))


def cut(blocks, limits, tolerance=0, expected=None):
    cutter = Cutter(limits, tolerance_samples=tolerance, expected=expected)
    for block in blocks:
        yield from cutter.push(block)
    last = cutter.end()
    if last is not None:
        yield last


def pieces_of(whole, lengths, limits, tolerance=0, expected=None):
    return list(cut(in_blocks(whole, lengths), limits, tolerance, expected))


def bounds_of(pieces):
    return [(piece.start, piece.start + len(piece.samples)) for piece in pieces]


def full_segments(total, limits):
    """Oracle: consecutive segments of the cap's length; too short a remainder belongs to none."""
    bounds = [(start, min(start + limits.max_samples, total)) for start in range(0, total, limits.max_samples)]
    return [(start, end) for start, end in bounds if end - start >= limits.min_samples]


def quiet_segments(whole, limits, tolerance):
    """Oracle: with all samples at hand, as long as another segment must follow."""
    cap, start, bounds = limits.max_samples, 0, []
    tolerance = max(min(tolerance, cap // 2, cap - limits.min_samples), 0)
    while is_over_length(len(whole) - start, limits):
        first = start + cap - tolerance
        end = first + quietest_point(whole[first : start + cap], limits.sample_rate)
        bounds.append((start, end))
        start = end
    last = (start, min(len(whole), start + cap))
    return [*bounds, last] if last[1] - start >= limits.min_samples else bounds


@given(st.integers(0, 2000), limits)
def test_over_length_is_what_needs_a_second_segment(total, limits):
    assert is_over_length(total, limits) == (len(full_segments(total, limits)) > 1)


@given(st.lists(st.integers(0, 300), max_size=12), st.integers(0, 300), limits, st.none() | st.integers(0, 1000))
def test_cutting_blocks_is_cutting_their_concatenation(lengths, rest, limits, expected):
    whole = np.arange(sum(lengths) + rest, dtype=np.float32)
    pieces = pieces_of(whole, lengths, limits, expected=expected)
    assert bounds_of(pieces) == full_segments(len(whole), limits)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    joined = np.concatenate([piece.samples for piece in pieces]) if pieces else whole[:0]
    np.testing.assert_array_equal(joined, whole[: len(joined)])


def swelling(total, seed):
    """Noise that swells and fades, with digital silence here and there."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.choice([0, 0.01, 0.3, 1], total // 20 + 1), 20)[:total]
    return (rng.normal(size=total) * loudness).astype(np.float32)


@given(st.lists(st.integers(0, 300), max_size=12), st.integers(0, 2000), limits, tolerances, st.integers(0, 9))
def test_a_cut_at_silence_depends_on_the_samples_and_not_on_their_blocks(lengths, total, limits, tolerance, seed):
    whole = swelling(total, seed)
    pieces = pieces_of(whole, lengths, limits, tolerance)
    bounds = bounds_of(pieces)
    assert bounds == quiet_segments(whole, limits, tolerance)
    assert [start for start, _ in bounds] == [0, *(end for _, end in bounds)][: len(bounds)]
    assert all(limits.min_samples <= end - start <= limits.max_samples for start, end in bounds)
    assert all(end - start >= limits.max_samples - tolerance for start, end in bounds[:-1])
    assert 0 <= total - (bounds[-1][1] if bounds else 0) < limits.min_samples
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    for piece, (start, end) in zip(pieces, bounds, strict=True):
        np.testing.assert_array_equal(piece.samples, whole[start:end])


@pytest.mark.parametrize("tolerance", [0, 240_000])
def test_a_segment_is_given_out_before_the_rest_is_decoded(tolerance):
    decoded = []

    def blocks():
        for index in range(100):
            decoded.append(index)
            yield np.zeros(160_000, np.float32)

    first = next(cut(blocks(), LIMITS, tolerance))
    assert len(first.samples) == LIMITS.max_samples
    assert not first.is_last
    assert len(decoded) == 61  # 600 s in blocks of 10 s, and the one that shows that more follows


# In a process of its own: what other tests' threads allocate here would count, too.
MEASURE = """
import sys, tracemalloc
import numpy as np
from af3pipe.audio.segments import AudioLimits
from tests.audio.test_segments import cut

limits = AudioLimits(*map(int, sys.argv[1].split()))
whole = np.linspace(0, 1, 5 * limits.max_samples, dtype=np.float32)  # 5 segments
for case in sys.argv[2:]:
    block, tolerance = map(int, case.split())
    blocks = (whole[start : start + block] for start in range(0, len(whole), block))
    found = 0
    tracemalloc.start()
    for piece in cut(blocks, limits, tolerance, expected=len(whole)):
        found += len(piece.samples)
        del piece  # as a caller that is done with it
    assert found == len(whole)
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def test_memory_is_that_of_one_segment_however_long_the_recording():
    small = LIMITS._replace(max_samples=160_000)
    # Blocks that are small, of a second, and all in one.
    cases = [(block, tolerance) for block in (7, 16_000, 800_000) for tolerance in (0, 16_000)]
    asked = [" ".join(map(str, numbers)) for numbers in (small, *cases)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *asked], capture_output=True, text=True, check=True)
    for (block, tolerance), grown in zip(cases, map(int, done.stdout.split()), strict=True):
        assert grown < 4 * (1.2 * small.max_samples + tolerance), block


def test_the_cap_itself_is_one_segment():
    for total, lengths in [
        (9_600_000, [9_600_000]),
        (9_600_479, [9_600_000]),
        (9_600_480, [9_600_000, 480]),
        (479, []),
    ]:
        pieces = pieces_of(np.ones(total, np.float32), [160_000] * 60, LIMITS)
        assert [len(piece.samples) for piece in pieces] == lengths
