"""A recording's result: which state it ends in, what its row says, and that nothing is unaccounted for."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.schemas import Covered, Levels, Reason, Recording, Rejected, Stage, TerminalState
from af3pipe.transforms.outcome import to_dead_letter
from af3pipe.transforms.result import Unaccounted, covered_by, gone_result, make_result, rejected_result
from tests.outputs import answer_row

KEYS = map(str, itertools.count())
RECORDING = Recording("id", "a.wav")
LEVELS = Levels(-3.0, -20.0, 0.0, False)
LETTER = to_dead_letter(Rejected(Stage.DECODE, Reason.DECODE_ERROR, "broken"), RECORDING, stage=Stage.DECODE)


def row_of(recording, covered, letters=(), requested=frozenset()):
    """Of what earlier runs cover, which is all that the row is made of."""
    return make_result(recording, (), letters, requested, kept=covered).row


def state(recording, covered, failed=()):
    return row_of(recording, covered, failed).terminal_state


def test_whole_recording_is_ok():
    assert state(RECORDING, [Covered(next(KEYS), "caption", ((0.0, 9.0),), 9.0, LEVELS)]) is TerminalState.OK


def test_all_segments_of_a_split_recording_are_ok():
    parts = [
        Covered(next(KEYS), "caption", ((0.0, 600.0),), 650.1, LEVELS),
        Covered(next(KEYS), "caption", ((600.0, 650.0),), 650.0, LEVELS),
    ]
    result = row_of(RECORDING, parts, [])
    assert result.terminal_state is TerminalState.OK
    assert (result.duration_s, result.covered_s, result.kept_answers) == (650.0, 650.0, 2)


def test_a_header_that_overstates_does_not_make_a_recording_partial():
    parts = [
        Covered(next(KEYS), "caption", ((0.0, 600.0),), 700.0, LEVELS),
        Covered(next(KEYS), "caption", ((600.0, 650.0),), 650.0, LEVELS),
    ]
    assert state(RECORDING, parts) is TerminalState.OK


def test_truncated_recording_is_partial():
    result = row_of(RECORDING, [Covered(next(KEYS), "caption", ((0.0, 600.0),), 700.0, LEVELS)], [])
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
    result = row_of(RECORDING, [], [LETTER, LETTER._replace(dead_letter_key="other", reason=Reason.TOO_LONG)])
    assert result.terminal_state is TerminalState.DEAD_LETTER
    assert result.reasons == ("decode_error", "too_long")


def test_nothing_at_all_has_no_terminal_state():
    with pytest.raises(Unaccounted, match=r"a\.wav ended without an answer to each task"):
        row_of(RECORDING, [], [])


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
    if not kept and not letters:
        with pytest.raises(Unaccounted):
            row_of(RECORDING, kept)
        return
    result = row_of(RECORDING, kept, [LETTER] * letters)
    if not kept:
        assert result.terminal_state is TerminalState.DEAD_LETTER
    elif letters or drop_last:
        assert result.terminal_state is TerminalState.OK_PARTIAL
    else:
        assert result.terminal_state is TerminalState.OK


def test_a_task_that_came_to_nothing_is_not_accounted_for():
    caption = Covered(next(KEYS), "caption/", ((0.0, 9.0),), 9.0, LEVELS)
    asked = frozenset({"caption/", "transcript/"})
    with pytest.raises(Unaccounted):
        row_of(RECORDING, [caption], [], asked)
    assert row_of(RECORDING, [caption], [LETTER], asked).terminal_state is TerminalState.OK_PARTIAL


def test_what_is_told_twice_counts_once():
    caption = Covered(next(KEYS), "caption/", ((0.0, 5.0),), 10.0, LEVELS)
    result = row_of(RECORDING, [caption, caption], [LETTER, LETTER])
    assert (result.kept_answers, result.dead_letters, result.covered_s) == (1, 1, 5.0)


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
        result = row_of(RECORDING, order, [LETTER])
        assert (result.peak_dbfs, result.clipped_share, result.silent) == (0.0, pytest.approx(0.15), False)
        assert result.rms_dbfs == pytest.approx(-10 + 10 * math.log10(0.75))
    assert row_of(RECORDING, parts[1:], [LETTER]).silent


def test_levels_are_not_known_where_nothing_was_answered():
    result = row_of(RECORDING, [], [LETTER])
    assert (result.peak_dbfs, result.rms_dbfs, result.clipped_share, result.silent) == (None, None, None, None)


def test_new_answers_and_those_of_earlier_runs_are_counted_apart():
    new, kept = answer_row(1), covered_by(answer_row(2))
    written = LETTER._replace(dead_letter_key="written", run_id="run 1")
    row, answers, letters = make_result(RECORDING, [new], [LETTER, written], kept=[kept, covered_by(new)])
    assert (row.answers, row.kept_answers) == (1, 1)
    assert row.answer_keys == tuple(sorted([new.answer_key, kept.answer_key]))
    assert (row.dead_letters, row.kept_dead_letters) == (1, 1)
    assert row.dead_letter_keys == tuple(sorted([LETTER.dead_letter_key, "written"]))
    assert (answers, letters) == ((new,), (LETTER,))


def test_a_row_says_which_audio_it_is_of_and_all_of_its_metadata():
    recording = Recording(
        "7",
        "s3://b/a.wav?token=abcdef",
        10,
        "etag",
        "2026-01-02T03:04:05+00:00",
        1.0,
        None,
        (),
        '{"n": 1}',
        "left",
        2,
    )
    row = row_of(recording._replace(work_key="work"), [Covered("k", "caption/", ((1.0, 9.0),), 9.0, LEVELS)])
    assert row.uri == "s3://b/a.wav?token=***"
    assert row.source_key == recording.source_key
    assert (row.recording_id, row.size_bytes, row.etag, row.mtime) == recording[:1] + recording[2:5]
    assert (row.offset_s, row.channel, row.stream, row.metadata, row.work_key) == (1.0, "left", 2, '{"n": 1}', "work")


def test_what_is_rejected_before_it_is_opened_has_a_row():
    recording = RECORDING._replace(mtime="2026-01-02T03:04:05+00:00", metadata='{"n": 1}', channel="left")
    letters = [
        to_dead_letter(Rejected(Stage.LIST, reason, "no"), recording, stage=Stage.LIST)
        for reason in (Reason.UNSUPPORTED_FORMAT, Reason.NOT_FOUND)
    ]
    found = rejected_result(letters)
    assert found.row._replace(created_at=0) == rejected_result(letters[::-1]).row._replace(created_at=0)
    assert set(found.dead_letters) == set(letters)
    row = found.row
    assert (row.terminal_state, row.answers, row.dead_letters) == (TerminalState.DEAD_LETTER, 0, 2)
    assert (row.recording_id, row.mtime, row.metadata, row.channel) == ("id", recording.mtime, '{"n": 1}', "left")
    assert row.reasons == ("not_found", "unsupported_format")


def test_what_is_rejected_keeps_an_id_that_looks_like_a_secret():
    """Its dead letter's input masks it; who waits for it knows it by its id."""
    one = Recording("a?token=abcdef", "s3://archive/gone.wav")
    letter = to_dead_letter(Rejected(Stage.LIST, Reason.NOT_FOUND, "gone"), one, stage=Stage.LIST)
    assert "abcdef" not in letter.input
    assert rejected_result([letter]).row.recording_id == letter.recording_id == one.recording_id


def test_what_is_no_recording_any_more_has_nothing():
    row, answers, letters = gone_result(RECORDING._replace(work_key="work"))
    assert (answers, letters) == ((), ())
    assert (row.terminal_state, row.work_key, row.answer_keys) == (TerminalState.SKIPPED_DONE, None, ())
    assert (row.answers, row.kept_answers, row.covered_s) == (0, 0, 0.0)
    assert (row.duration_s, row.peak_dbfs) == (None, None)
