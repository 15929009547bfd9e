"""Rows of earlier runs: read from their files, and what of a recording need not be done again."""

from datetime import datetime, timezone

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.schemas import (
    RECORDING_SCHEMA,
    Answer,
    Covered,
    DeadLetter,
    Levels,
    Reason,
    Recording,
    RecordingRow,
    Rejected,
    Stage,
    source_key,
    to_metadata,
)
from af3pipe.storage import StorageError
from af3pipe.tables.existing import (
    ExistingAnswer,
    ExistingLetter,
    ExistingRecording,
    ExistingRows,
    Place,
    copy_of,
    is_same_metadata,
    read_answers,
    read_existing,
)
from af3pipe.tables.latest import table_files
from af3pipe.tables.write import ANSWERS, DEAD_LETTER_ROWS, RECORDINGS, write_rows
from af3pipe.transforms.outcome import to_dead_letter
from af3pipe.transforms.result import covered_by
from tests import outputs
from tests.rows import rows

LEVELS = Levels(-3.0, -20.0, 0.0, False)
URI = "s3://b/a.flac"
BASE = Recording("id", URI, 10, "etag", "2026-01-01T00:00:00+00:00", work_key="work")
SOURCE = source_key(URI)


# --- what is done


def done(recording=BASE, *, answers=("k1", "k2"), letters=(), reasons=(), created_at=1, state="ok"):
    """A row of `recordings/`."""
    return ExistingRecording(
        recording.uri,
        recording.recording_id,
        recording.source_key,
        recording.work_key,
        state,
        answers,
        letters,
        reasons,
        recording.metadata,
        recording.offset_s,
        recording.channel,
        recording.stream,
        5.0,
        5.0,
        *LEVELS,
        created_at,
    )


def answered(*keys, recording=BASE, created_at=1):
    """Rows of answers."""
    return [
        ExistingAnswer(
            recording.uri,
            recording.recording_id,
            recording.source_key,
            Covered(key, "caption/", ((0.0, 5.0),), 5.0, LEVELS),
            recording.metadata,
            Place("out", "captions", "file"),
            created_at,
        )
        for key in keys
    ]


def written(key, run_id="run 1", recording_id="id"):
    """A row of `dead_letters/`."""
    return ExistingLetter(URI, recording_id, key, run_id)


def is_done(recording, *rows, retry=False):
    return ExistingRows(rows).done(recording, retry=retry) is not None


def test_the_same_work_is_done():
    assert is_done(BASE, done(), *answered("k1", "k2", "other"))
    row = done(letters=("l",), reasons=("too_long",), state="ok_partial")
    assert is_done(BASE, row, *answered("k1", "k2"), written("l"))


def test_what_nobody_can_tell_from_another_is_never_done():
    nameless = BASE._replace(etag=None, mtime=None)
    rows = [done(nameless), *answered("k1", "k2", recording=nameless)]
    assert not is_done(nameless, *rows)
    assert ExistingRows(rows).of(nameless) == (nameless, [])


@pytest.mark.parametrize(
    ("recordings", "answers", "letters"),
    [
        ([], ("k1", "k2"), []),
        ([done()], ("k1",), []),
        ([done(letters=("l",), reasons=("too_long",))], ("k1", "k2"), []),
        ([done(BASE._replace(work_key="another"))], ("k1", "k2"), []),
        ([done(BASE._replace(work_key=None))], ("k1", "k2"), []),
        ([done(BASE._replace(recording_id="another"))], ("k1", "k2"), []),
        ([done(BASE._replace(metadata='{"n": 1}'))], ("k1", "k2"), []),
        *(
            ([done(letters=("l",), reasons=("too_long", reason.value))], ("k1", "k2"), [written("l")])
            for reason in Reason
            if reason.retryable
        ),
    ],
)
def test_what_is_not_done_comes_with_what_there_is(recordings, answers, letters):
    rows = [*recordings, *answered(*answers), *letters]
    assert not is_done(BASE, *rows)
    left, copied = ExistingRows(rows).of(BASE)
    assert [found.answer_key for found in left.existing.answers] == sorted(answers)
    assert left.existing.dead_letters == tuple((letter.dead_letter_key, letter.run_id) for letter in letters)
    assert left._replace(existing=BASE.existing) == BASE
    assert copied == []


def test_answers_of_another_id_do_not_count_as_its_own():
    other = BASE._replace(recording_id="other")
    rows = [done(), *answered("k1", recording=other), *answered("k2")]
    assert not is_done(BASE, *rows)
    left, copied = ExistingRows(rows).of(BASE)
    assert [found.answer_key for found in left.existing.answers] == ["k1", "k2"]
    assert [found.recording_id for found in copied] == ["other"]


def test_answers_about_other_audio_of_the_object_are_not_copied():
    part = BASE._replace(recording_id="part", offset_s=1.0)
    left, copied = ExistingRows(answered("k1", recording=part)).of(BASE)
    assert (left, copied) == (BASE, [])
    # Rows of format 1 have no source_key; without an id of a manifest's, theirs is the same.
    (old,) = answered("k1", recording=BASE._replace(recording_id=SOURCE))
    _, copied = ExistingRows([old._replace(source_key=None)]).of(BASE)
    assert len(copied) == 1
    _, copied = ExistingRows([old._replace(source_key=None, recording_id="7")]).of(BASE)
    assert copied == []


def test_only_what_may_turn_out_otherwise_is_tried_again():
    for reason in Reason:
        row = done(answers=(), letters=("l",), reasons=(reason.value,), state="dead_letter")
        assert is_done(BASE, row, written("l")) == (not reason.retryable), reason
        assert not is_done(BASE, row, written("l"), retry=True)


def test_retry_leaves_alone_what_has_no_dead_letter():
    assert is_done(BASE, done(), *answered("k1", "k2"), retry=True)


def test_of_several_rows_of_the_same_work_any_whose_answers_are_there_counts():
    old, new = done(created_at=1, answers=("k1",)), done(created_at=2, answers=("k2",))
    other = done(BASE._replace(work_key="another"), created_at=3, answers=("k3",))
    for order in ([old, new, other], [other, new, old], [new, other, old]):
        assert is_done(BASE, *order, *answered("k1", "k3"))
        assert is_done(BASE, *order, *answered("k2"))
        assert not is_done(BASE, *order, *answered("k3"))
        assert ExistingRows(order).recordings == [other, new, old]


def test_metadata_that_changed_meanwhile_makes_it_another():
    other = BASE._replace(metadata='{"n": 1}')
    rows = [done(created_at=1), *answered("k1", "k2", created_at=1)]
    later = [done(other, created_at=2), *answered("k1", "k2", recording=other, created_at=2)]
    for order in (rows + later, later + rows):
        assert not is_done(BASE, *order), "readers see the newer rows"
        assert is_done(other, *order)
        _, copied = ExistingRows(order).of(BASE)
        assert {found.covered.answer_key for found in copied} == {"k1", "k2"}


def test_numbers_that_format_1_wrote_as_text_are_the_same():
    old = done()._replace(source_key=None, metadata=to_metadata({"n": "1", "x": "true", "t": "a"}))
    assert is_same_metadata(old, to_metadata({"n": 1, "x": True, "t": "a"}))
    assert not is_same_metadata(old, to_metadata({"n": 2, "x": True, "t": "a"}))
    assert not is_same_metadata(old._replace(source_key=SOURCE), to_metadata({"n": 1, "x": True, "t": "a"}))


def test_a_key_that_is_there_twice_counts_once_and_the_first_run_that_wrote_it():
    existing = ExistingRows([*answered("k1", "k1"), written("l", "run 2"), written("l", "run 1")])
    left, _ = existing.of(BASE)
    assert len(left.existing.answers) == 1
    assert left.existing.dead_letters == (("l", "run 1"),)


def rejected(reason=Reason.UNSUPPORTED_FORMAT, detail="no", uri=URI):
    return to_dead_letter(Rejected(Stage.LIST, reason, detail), Recording("id", uri), stage=Stage.LIST)


def test_what_was_rejected_for_the_same_reasons_is_rejected_again_without_a_row():
    letter, retryable = rejected(), rejected(next(reason for reason in Reason if reason.retryable))
    for one, expected in ((letter, True), (retryable, False)):
        key = one.dead_letter_key
        row = done(answers=(), letters=(key,), reasons=(one.reason.value,), state="dead_letter")
        existing = ExistingRows([row, written(key)])
        assert existing.is_rejected([one]) == expected
        assert not existing.is_rejected([one], retry=True)
        assert not existing.is_rejected([one, rejected(uri="other")])
        assert not ExistingRows([row]).is_rejected([one]), "its dead letter is not there"
        assert not ExistingRows([done(letters=(key,)), written(key)]).is_rejected([one]), "it had answers"
        assert [found.run_id for found in existing.with_first_run([one, rejected(uri="other")])] == ["run 1", ""]


# --- reading


def write(folder, answers=(), letters=(), results=()):
    for made, row_format, table in (
        (answers, ANSWERS, "captions"),
        (letters, DEAD_LETTER_ROWS, "dead_letters"),
        (results, RECORDINGS, "recordings"),
    ):
        if made:
            list(write_rows(made, row_format, str(folder), table, f"run-{table}"))


def read(folder, table):
    return [
        row for info in table_files(str(folder)).get(table, ()) for row in read_existing(str(folder), table, info)
    ]


@settings(max_examples=25)
@given(
    st.lists(rows(Answer), max_size=3),
    st.lists(rows(DeadLetter), max_size=3),
    st.lists(rows(RecordingRow), max_size=3),
)
def test_rows_are_read_as_they_were_written(tmp_path_factory, answers, letters, results):
    folder = tmp_path_factory.mktemp("out")
    results = [row._replace(created_at=row.created_at * 10**6, channel="left") for row in results]
    write(folder, answers, letters, results)
    by_key = {ANSWERS.key(row): row for row in answers}
    found = read(folder, "captions")
    assert {(row.recording_id, row.source_key, row.covered, row.metadata) for row in found} == {
        (row.recording_id, row.source_key, covered_by(row), row.metadata) for row in by_key.values()
    }
    whole = read_answers(found)
    assert len(whole) == len({(row.recording_id, row.covered.answer_key) for row in found})
    for answer in whole:
        assert answer == by_key[ANSWERS.key(answer)]._replace(run_id="run-captions")
    told = {row.dead_letter_key: row for row in letters}
    assert set(read(folder, "dead_letters")) == {
        ExistingLetter(row.uri, row.recording_id, row.dead_letter_key, "run-dead_letters") for row in told.values()
    }
    by_id = {RECORDINGS.key(row): row for row in results}
    assert set(read(folder, "recordings")) == {
        ExistingRecording(
            **{name: getattr(row, name) for name in ExistingRecording._fields}
            | {"terminal_state": row.terminal_state.value}
        )
        for row in by_id.values()
    }


def test_rows_of_format_1_are_read(tmp_path):
    """A map of text as metadata, a text as modification time, a settled_state, no source_key."""
    when = datetime(2026, 1, 2, tzinfo=timezone.utc)
    columns = {
        "recording_id": ["7"],
        "uri": [URI],
        "terminal_state": ["skipped_done"],
        "settled_state": ["ok_partial"],
        "answer_keys": pa.array([["k"]], pa.list_(pa.string())),
        "dead_letter_keys": pa.array([None], pa.list_(pa.string())),
        "reasons": pa.array([[]], pa.list_(pa.string())),
        "work_key": ["w"],
        "offset_s": [1.5],
        "channel": ["left"],
        "stream": pa.array([None], pa.int32()),
        "metadata": pa.array([[("row", "1"), ("speaker", "Ada")]], pa.map_(pa.string(), pa.string())),
        "created_at": pa.array([when], pa.timestamp("us", "UTC")),
        "run_id": ["run"],
    }
    (tmp_path / "recordings").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "recordings" / "a.parquet")
    (found,) = read(tmp_path, "recordings")
    assert found == ExistingRecording(
        URI,
        "7",
        None,
        "w",
        "ok_partial",
        ("k",),
        (),
        (),
        '{"row": "1", "speaker": "Ada"}',
        1.5,
        "left",
        None,
        None,
        0.0,
        *[None] * 4,
        round(when.timestamp() * 1e6),
    )


def test_a_copy_is_of_the_other_recording():
    answer = outputs.answer(1)._replace(run_id="run 1")
    other = Recording("8", answer.uri, metadata='{"n": 1}')
    copy = copy_of(answer, other, "shown")
    assert copy == answer._replace(
        recording_id="8", uri="shown", source_key=other.source_key, metadata='{"n": 1}', run_id=""
    )


def test_only_rows_that_are_wanted_are_read(tmp_path):
    outputs.write_run(tmp_path, outputs.FIRST, range(10))
    infos = table_files(str(tmp_path))["captions"]
    found = [
        row
        for info in infos
        for row in read_existing(
            str(tmp_path),
            "captions",
            info,
            lambda batch: pa.compute.ends_with(batch["uri"], "/3.flac").to_numpy(zero_copy_only=False),
        )
    ]
    assert [row.uri for row in found] == ["s3://archive/3.flac"]
    (answer,) = read_answers(found)
    assert answer.text == "heard 3 "


def test_a_file_that_is_no_parquet_or_is_cut_off_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "recordings").mkdir()
    path = tmp_path / "recordings" / "a.parquet"
    whole = pa.BufferOutputStream()
    pq.write_table(RECORDING_SCHEMA.empty_table(), whole)
    path.write_bytes(whole.getvalue().to_pybytes())
    (info,) = table_files(str(tmp_path))["recordings"]
    for body in (b"", b"no Parquet", whole.getvalue().to_pybytes()[:-9]):
        path.write_bytes(body)
        with pytest.raises(StorageError, match=r"a\.parquet, with rows of earlier runs, cannot be used: .* move"):
            list(read_existing(str(tmp_path), "recordings", info._replace(size_bytes=len(body))))
    path.unlink()
    with pytest.raises(StorageError, match="Start the run again if another program"):
        list(read_existing(str(tmp_path), "recordings", info))
