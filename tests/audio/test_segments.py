import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.audio.segments import AudioLimits, cut, is_over_length, reaches_end, segment_bounds

limits = st.tuples(st.integers(1, 200), st.integers(1, 20)).map(
    lambda pair: AudioLimits(sample_rate=100, max_samples=max(pair), min_samples=min(pair), window_samples=10)
)
LIMITS = AudioLimits(sample_rate=16000, max_samples=9_600_000, min_samples=480, window_samples=480_000)


@given(st.integers(0, 2000), limits)
def test_bounds_are_consecutive_full_but_the_last_and_miss_less_than_a_token(total, limits):
    bounds = segment_bounds(total, limits)
    assert [start for start, _ in bounds] == [0, *(end for _, end in bounds)][: len(bounds)]
    assert all(end - start == limits.max_samples for start, end in bounds[:-1])
    assert all(limits.min_samples <= end - start <= limits.max_samples for start, end in bounds)
    covered = bounds[-1][1] if bounds else 0
    assert 0 <= total - covered < limits.min_samples
    assert is_over_length(total, limits) == (len(bounds) > 1)


@given(st.lists(st.integers(0, 300), max_size=12), limits)
def test_cutting_blocks_is_cutting_their_concatenation(lengths, limits):
    whole = np.arange(sum(lengths), dtype=np.float32)
    blocks = np.split(whole, np.cumsum(lengths)[:-1]) if lengths else []
    pieces = list(cut(iter(blocks), limits))
    bounds = segment_bounds(len(whole), limits)
    assert [(piece.start, piece.start + len(piece.samples)) for piece in pieces] == bounds
    assert [piece.is_last for piece in pieces] == [index == len(bounds) - 1 for index in range(len(bounds))]
    joined = np.concatenate([piece.samples for piece in pieces]) if pieces else whole[:0]
    np.testing.assert_array_equal(joined, whole[: len(joined)])


@given(st.integers(0, 3000), limits)
def test_only_the_end_of_the_last_segment_reaches_the_end(total, limits):
    ends = [
        reaches_end(end / limits.sample_rate, total / limits.sample_rate, limits)
        for _, end in segment_bounds(total, limits)
    ]
    assert ends == [False] * (len(ends) - 1) + [True] * bool(ends)


def test_a_segment_is_given_out_before_the_rest_is_decoded():
    decoded = []

    def blocks():
        for index in range(100):
            decoded.append(index)
            yield np.zeros(160_000, np.float32)

    first = next(cut(blocks(), LIMITS))
    assert len(first.samples) == LIMITS.max_samples
    assert not first.is_last
    assert len(decoded) == 61  # 600 s in blocks of 10 s, and the one that shows that more follows


def test_the_cap_itself_is_one_segment():
    assert segment_bounds(9_600_000, LIMITS) == [(0, 9_600_000)]
    assert segment_bounds(9_600_479, LIMITS) == [(0, 9_600_000)]
    assert segment_bounds(9_600_480, LIMITS) == [(0, 9_600_000), (9_600_000, 9_600_480)]
    assert segment_bounds(479, LIMITS) == []
