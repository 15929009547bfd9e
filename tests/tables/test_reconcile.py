"""What a run wrote, compared with what its rows say that it wrote."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af3pipe.tables.reconcile import count_run

RUN = "20260101T000000Z-abcdef"


KEYS = {"captions": "answer_key", "transcripts": "answer_key", "dead_letters": "dead_letter_key"}


def file_of(output, table, number=0, run_id=RUN):
    return output / table / f"{run_id}-{number:016x}.parquet"


def write(output, table, rows, keys="key"):
    """A file of a table; rows of the same recording and keys are the same row."""
    if table in KEYS:
        rows = [{KEYS[table]: f"{table}-{keys}", **row} for row in rows]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    (output / table).mkdir(exist_ok=True)
    number = len(list((output / table).iterdir()))
    pq.write_table(pa.table(columns), file_of(output, table, number))


def recording(name, state="ok", covered_s=1.5, answers=1, dead_letters=0, kept_dead_letters=0, work="captions"):
    return {
        "recording_id": name,
        "work_key": work,
        "terminal_state": state,
        "covered_s": covered_s,
        "answers": answers,
        "dead_letters": dead_letters,
        "kept_dead_letters": kept_dead_letters,
    }


@pytest.fixture
def output(tmp_path):
    """Four recordings in two files: one with two answers, one with a dead letter, one that is none any more."""
    write(tmp_path, "recordings", [recording("a"), recording("b", answers=2)])
    failed = recording("c", "dead_letter", 0.0, answers=0, dead_letters=1)
    write(tmp_path, "recordings", [failed, recording("d", "skipped_done", answers=0, kept_dead_letters=2)])
    write(tmp_path, "captions", [{"recording_id": "a"}, {"recording_id": "b"}])
    write(tmp_path, "transcripts", [{"recording_id": "b"}])
    write(tmp_path, "dead_letters", [{"recording_id": "c", "reason": "empty_file"}])
    return tmp_path


def test_right_books(output):
    counts = count_run(str(output), RUN, 4)
    assert counts.reconciled
    assert counts.states == {"ok": 2, "dead_letter": 1, "skipped_done": 1}
    assert counts.answers == {"captions": 2, "transcripts": 1}
    assert counts.dead_letters == {"empty_file": 1}
    assert counts.kept_dead_letters == 2
    assert counts.audio_s == 3.0


def test_what_is_skipped_is_counted_and_has_no_row(output):
    counts = count_run(str(output), RUN, 9, 5)
    assert counts.reconciled
    assert counts.states == {"ok": 2, "dead_letter": 1, "skipped_done": 6}
    assert count_run(str(output), RUN, 9, 4).problems == (
        "9 recordings found, but 8 recordings with a terminal state",
    )
    all_of_it = count_run(str(output), "20990101T000000Z-abcdef", 3, 3)
    assert (all_of_it.reconciled, all_of_it.states) == (True, {"skipped_done": 3})


def test_nothing_found_and_nothing_written(tmp_path):
    counts = count_run(str(tmp_path), RUN, 0)
    assert counts.reconciled
    assert (counts.states, counts.answers, counts.audio_s) == ({}, {}, 0.0)


def test_a_recording_without_a_row(output):
    assert count_run(str(output), RUN, 5).problems == ("5 recordings found, but 4 recordings with a terminal state",)


def test_a_recording_that_is_there_twice(output):
    write(output, "recordings", [recording("d", "skipped_done", answers=0, work=None)])
    assert count_run(str(output), RUN, 5).problems == ("5 recordings with a state, but 4 different ones",)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"recording_id": "a"}], "3 answers expected, 4 rows written; 1 recordings differ, for example a"),
        ([{"recording_id": "x"}], "3 answers expected, 4 rows written; 1 recordings differ, for example x"),
    ],
)
def test_a_row_too_many(output, rows, problem):
    write(output, "captions", rows, keys="another")
    assert count_run(str(output), RUN, 4).problems == (problem,)


def test_rows_that_a_retry_wrote_again_under_another_name_are_counted_once(output):
    before = count_run(str(output), RUN, 4)
    write(output, "captions", [{"recording_id": "b"}, {"recording_id": "a"}])
    write(output, "dead_letters", [{"recording_id": "c", "reason": "empty_file"}])
    write(output, "recordings", [recording("a"), recording("c", "dead_letter", 0.0, answers=0, dead_letters=1)])
    assert count_run(str(output), RUN, 4) == before
    assert count_run(str(output), RUN, None) == before


def test_rows_that_are_missing_where_others_are_too_many(output):
    """As many as there should be, but of other recordings."""
    file_of(output, "captions").unlink()
    write(output, "captions", [{"recording_id": "a"}, {"recording_id": "c"}])
    assert count_run(str(output), RUN, 4).problems == (
        "3 answers expected, 3 rows written; 2 recordings differ, for example b",
    )


def test_a_dead_letter_that_is_missing(output):
    file_of(output, "dead_letters").unlink()
    assert count_run(str(output), RUN, 4).problems == (
        "1 dead letters expected, 0 rows written; 1 recordings differ, for example c",
    )


def test_other_runs_rows_do_not_count(output):
    file_of(output, "captions").rename(file_of(output, "captions", run_id="20250101T000000Z-abcdef"))
    assert count_run(str(output), RUN, 4).problems == (
        "3 answers expected, 1 rows written; 2 recordings differ, for example a",
    )


def test_of_a_stream_nobody_knows_how_many_there_are_to_find(output):
    counts = count_run(str(output), RUN, None)
    assert counts.reconciled
    assert counts.found == 4


def test_a_stream_may_have_answered_a_recording_twice(output):
    """When it was written over; but each row says what it has, and no row may be missing."""
    write(output, "recordings", [recording("a", work="captions of what is there now")])
    assert count_run(str(output), RUN, None).problems == (
        "4 answers expected, 3 rows written; 1 recordings differ, for example a",
    )
    write(output, "captions", [{"recording_id": "a"}], keys="another")
    counts = count_run(str(output), RUN, None)
    assert counts.reconciled
    assert (counts.found, counts.answers) == (5, {"captions": 3, "transcripts": 1})
    assert not count_run(str(output), RUN, 4).reconciled


def test_a_stream_that_found_nothing(tmp_path):
    counts = count_run(str(tmp_path), RUN, None)
    assert counts.reconciled
    assert counts.found == 0
