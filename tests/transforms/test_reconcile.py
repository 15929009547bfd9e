import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.schemas import Covered, Levels, Recording, TerminalState
from af3pipe.transforms.reconcile import Failed, settle

KEYS = map(str, itertools.count())
RECORDING = Recording("id", "a.wav")
LEVELS = Levels(-3.0, -20.0, 0.0, False)
LETTER = Failed("letter", "decode_error", "{}")


def state(recording, covered, failed=()):
    return settle(recording, covered, failed).terminal_state


def test_whole_recording_is_ok():
    assert state(RECORDING, [Covered(next(KEYS), "caption", ((0.0, 9.0),), 9.0, LEVELS)]) is TerminalState.OK


def test_all_segments_of_a_split_recording_are_ok():
    parts = [
        Covered(next(KEYS), "caption", ((0.0, 600.0),), 650.1, LEVELS),
        Covered(next(KEYS), "caption", ((600.0, 650.0),), 650.0, LEVELS),
    ]
    result = settle(RECORDING, parts, [])
    assert result.terminal_state is TerminalState.OK
    assert (result.duration_s, result.covered_s, result.answers) == (650.0, 650.0, 2)


def test_a_header_that_overstates_does_not_make_a_recording_partial():
    parts = [
        Covered(next(KEYS), "caption", ((0.0, 600.0),), 700.0, LEVELS),
        Covered(next(KEYS), "caption", ((600.0, 650.0),), 650.0, LEVELS),
    ]
    assert state(RECORDING, parts) is TerminalState.OK


def test_truncated_recording_is_partial():
    result = settle(RECORDING, [Covered(next(KEYS), "caption", ((0.0, 600.0),), 700.0, LEVELS)], [])
    assert result.terminal_state is TerminalState.OK_PARTIAL
    assert result.covered_s == 600.0


def test_a_gap_in_one_task_is_partial():
    covered = [
        Covered(next(KEYS), "caption", ((0.0, 9.0),), 9.0, LEVELS),
        Covered(next(KEYS), "transcript", ((0.0, 4.0),), 9.0, LEVELS),
    ]
    assert state(RECORDING, covered) is TerminalState.OK_PARTIAL


def test_a_dead_letter_beside_answers_is_partial():
    assert (
        state(RECORDING, [Covered(next(KEYS), "caption", ((0.0, 9.0),), 9.0, LEVELS)], [LETTER])
        is TerminalState.OK_PARTIAL
    )


def test_only_dead_letters_is_a_dead_letter():
    result = settle(RECORDING, [], [LETTER, LETTER._replace(dead_letter_key="other", reason="too_long")])
    assert result.terminal_state is TerminalState.DEAD_LETTER
    assert result.reasons == ("decode_error", "too_long")


def test_nothing_at_all_has_no_terminal_state():
    assert settle(RECORDING, [], []) is None


def test_a_range_is_whole_when_the_range_is_covered():
    recording = RECORDING._replace(offset_s=5.0, duration_s=2.0)
    assert state(recording, [Covered(next(KEYS), "caption", ((5.0, 7.0),), 60.0, LEVELS)]) is TerminalState.OK


def test_a_range_that_ends_beyond_the_recording_is_whole_at_its_end():
    recording = RECORDING._replace(offset_s=5.0, duration_s=20.0)
    assert state(recording, [Covered(next(KEYS), "caption", ((5.0, 12.0),), 12.0, LEVELS)]) is TerminalState.OK


@given(
    st.lists(st.floats(0.1, 1200), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 2),
)
def test_every_recording_with_any_outcome_has_exactly_one_state(lengths, drop_last, letters):
    end, parts = 0.0, []
    for length in lengths:
        parts.append(Covered(next(KEYS), "transcript", ((end, end + length),), sum(lengths), LEVELS))
        end += length
    kept = parts[:-1] if drop_last else parts
    result = settle(RECORDING, kept, [LETTER] * letters)
    if not kept and not letters:
        assert result is None
    elif not kept:
        assert result.terminal_state is TerminalState.DEAD_LETTER
    elif letters or drop_last:
        assert result.terminal_state is TerminalState.OK_PARTIAL
    else:
        assert result.terminal_state is TerminalState.OK


def test_a_task_that_came_to_nothing_is_not_accounted_for():
    caption = Covered(next(KEYS), "caption/", ((0.0, 9.0),), 9.0, LEVELS)
    asked = frozenset({"caption/", "transcript/"})
    assert settle(RECORDING, [caption], [], asked) is None
    assert settle(RECORDING, [caption], [LETTER], asked).terminal_state is TerminalState.OK_PARTIAL


def test_what_is_told_twice_counts_once():
    caption = Covered(next(KEYS), "caption/", ((0.0, 5.0),), 10.0, LEVELS)
    result = settle(RECORDING, [caption, caption], [LETTER, LETTER])
    assert (result.answers, result.dead_letters, result.covered_s) == (1, 1, 5.0)


def test_two_pieces_over_the_same_seconds_hide_no_gap():
    twice = [Covered(next(KEYS), "caption/", ((0.0, 5.0),), 10.0, LEVELS) for _ in range(2)]
    assert state(RECORDING, twice) is TerminalState.OK_PARTIAL


def test_levels_are_of_the_segments_that_were_answered_for():
    loud, quiet = Levels(0.0, -10.0, 0.2, False), Levels(-70.0, -90.0, 0.0, True)
    parts = [
        Covered(next(KEYS), "caption", ((0.0, 600.0),), 800.0, loud),
        Covered(next(KEYS), "caption", ((600.0, 800.0),), 800.0, quiet),
        Covered(next(KEYS), "transcript", ((600.0, 800.0),), 800.0, quiet),  # heard less: the first one failed
    ]
    for order in itertools.permutations(parts):
        result = settle(RECORDING, order, [LETTER])
        assert (result.peak_dbfs, result.clipped_share, result.silent) == (0.0, pytest.approx(0.15), False)
        assert result.rms_dbfs == pytest.approx(-10 + 10 * math.log10(0.75))
    assert settle(RECORDING, parts[1:], [LETTER]).silent


def test_levels_are_not_known_where_nothing_was_answered():
    result = settle(RECORDING, [], [LETTER])
    assert (result.peak_dbfs, result.rms_dbfs, result.clipped_share, result.silent) == (None, None, None, None)
