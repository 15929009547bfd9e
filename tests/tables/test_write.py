"""The tables' files: named by their rows, whole or not there, and read by the programs that read Parquet."""

import json
import random

import duckdb
import fsspec
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds  # noqa: TID251 (a reader elsewhere, of local files)
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe import storage
from af3pipe.schemas import DeadLetter, Reason, Stage, to_metadata
from af3pipe.tables import write
from af3pipe.tables.layout import TABLE_SCHEMAS
from tests.outputs import answer, letter_row, recording_row, result
from tests.read_tables import read_table


def write_answers(rows, output, run_id="run"):
    return list(write.write_folders(rows, write.ANSWERS, str(output), run_id))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    write_answers([answer(n, task) for n in range(20) for task in ("caption", "transcript", "mood")], output)
    return output


def test_tasks_land_in_their_tables(written):
    assert sorted(path.name for path in written.iterdir()) == ["answers", "captions", "transcripts"]
    assert set(read_table(written / "answers")["task"].to_pylist()) == {"mood"}
    assert set(read_table(written / "captions")["run_id"].to_pylist()) == {"run"}


def test_duckdb_reads_it(written):
    query = f"""
        SELECT text, segments[1].end_s, choices[2], metadata->'$.speaker', mtime, created_at
        FROM '{written}/captions/*.parquet' WHERE uri LIKE '%Grüße 3.flac'
    """
    ((text, end_s, choice, speaker, mtime, created_at),) = duckdb.sql(query).fetchall()
    assert (text, end_s, choice, speaker) == ("text 3", 1.5, "no", "7")
    assert mtime.timestamp() == created_at.timestamp() == 1_767_323_045


def test_pandas_reads_it(written):
    frame = pd.read_parquet(written / "transcripts")
    assert len(frame) == 20
    assert str(frame["created_at"].dt.tz) == "UTC"
    assert frame.set_index("recording_id").loc["id3", "text"] == "text 3"


def test_polars_reads_it(written):
    frame = pl.read_parquet(written / "captions" / "*.parquet")
    assert frame.filter(pl.col("recording_id") == "id3")["segments"][0][0]["text"] == "text 3"


def test_pyarrow_dataset_reads_it_with_our_schema(written):
    dataset = ds.dataset(written / "captions", format="parquet")
    assert dataset.schema.equals(TABLE_SCHEMAS["captions"])
    assert dataset.count_rows() == 20


def test_the_same_rows_in_another_order_give_the_same_files(tmp_path):
    rows = [answer(n) for n in range(30)]
    write_answers(rows, tmp_path / "a")
    random.Random(0).shuffle(rows)
    write_answers(rows, tmp_path / "b")
    assert files(tmp_path / "a" / "captions") == files(tmp_path / "b" / "captions")


def test_a_retry_replaces_its_own_files_and_another_run_adds_to_them(tmp_path):
    rows = [answer(n) for n in range(5)]
    write_answers(rows, tmp_path)
    retried = [row._replace(text="decoded once more") for row in rows]  # names come from the keys, not the text
    write_answers(retried, tmp_path)
    assert len(files(tmp_path / "captions")) == 1
    assert set(read_table(tmp_path / "captions")["text"].to_pylist()) == {"decoded once more"}
    write_answers(rows, tmp_path, run_id="later")
    assert len(files(tmp_path / "captions")) == 2


def test_a_pane_and_its_day_are_told_by_names(tmp_path):
    rows, run_id = [answer(n) for n in range(3)], "20260102T030405Z-abcdef"
    how = {"partition_by": ["date", "speaker"], "day": "1999-12-31", "pane": "-19991231T235500Z"}
    uris = list(write.write_folders(rows, write.ANSWERS, str(tmp_path), run_id, **how))
    (name,) = files(tmp_path / "captions" / "date=1999-12-31" / "speaker=7")
    assert uris == [str(tmp_path / "captions" / "date=1999-12-31" / "speaker=7" / name)]
    assert name.startswith(f"{run_id}-19991231T235500Z-")
    again = list(write.write_folders(rows[::-1], write.ANSWERS, str(tmp_path), run_id, **how))
    other = list(write.write_folders(rows, write.ANSWERS, str(tmp_path), run_id, **how | {"pane": "-other"}))
    assert again == uris
    assert other != uris
    plain = list(write.write_folders(rows, write.ANSWERS, str(tmp_path), run_id, ["date"]))
    assert [uri.rsplit("/", 2)[1] for uri in plain] == ["date=2026-01-02"]
    assert plain[0].rsplit("/", 1)[1] == name.replace("-19991231T235500Z", "")


def test_rows_of_the_same_key_are_written_once(tmp_path):
    write_answers([answer(1), answer(1), answer(2)], tmp_path)
    assert read_table(tmp_path / "captions").num_rows == 2


def test_many_rows_make_several_files_and_all_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "ROWS_PER_FILE", 4)
    write_answers([answer(n) for n in range(95)], tmp_path)
    names = files(tmp_path / "captions")
    assert len(names) == 24
    assert all(pq.read_metadata(tmp_path / "captions" / name).num_rows <= 4 for name in names)
    found = read_table(tmp_path / "captions")["recording_id"].to_pylist()
    assert sorted(found) == sorted(f"id{n}" for n in range(95))


def test_output_on_an_object_store():
    write_answers([answer(1)], "memory://labels/out")
    found = fsspec.filesystem("memory").find("/labels/out")
    assert [name.rsplit("/", 2)[1] for name in found] == ["captions"]


def test_no_rows_make_no_file(tmp_path):
    assert list(write.write_results([], str(tmp_path), "run")) == []
    assert list(tmp_path.iterdir()) == []


def test_the_row_of_a_recording_is_written_last(tmp_path):
    uris = list(write.write_results([result(n, broken=True) for n in range(3)], str(tmp_path), "run"))
    assert [uri.removeprefix(f"{tmp_path}/").split("/")[0] for uri in uris] == [
        "captions",
        "dead_letters",
        "recordings",
    ]


# --- format 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An output with rows in three tables, and in one none; the metadata has values of all kinds."""
    output = tmp_path_factory.mktemp("out")
    metadata = to_metadata(KINDS)
    answers = [answer(n)._replace(metadata=metadata) for n in range(3)]
    write_answers(answers, output)
    list(write.write_folders([recording_row(1, answers[:1])], write.RECORDINGS, str(output), "run"))
    list(write.write_folders([letter_row(1)], write.DEAD_LETTER_ROWS, str(output), "run"))
    write.fill_empty_tables(str(output), ["transcripts"], "run")
    return output


KINDS = {
    "speaker": 7,
    "bpm": 128.5,
    "name": "Ä 'b' \"c\"",
    "live": True,
    "key": None,
    "tags": ["a", 1],
    "at": {"lat": 47.1},
}


def test_each_file_says_of_which_format_it_is(whole):
    paths = sorted(whole.rglob("*.parquet"))
    assert len({path.parent for path in paths}) == 4
    for path in paths:
        assert pq.read_metadata(path).metadata[b"af3pipe.format"] == b"2"


def test_metadata_is_json_with_numbers_as_numbers(whole):
    assert json.loads(read_table(whole / "captions")["metadata"][0].as_py()) == KINDS
    query = f"""
        SELECT avg((metadata->>'$.bpm')::DOUBLE), any_value(json_type(metadata, '$.speaker')),
            any_value(metadata->>'$.name'), any_value(json_type(metadata, '$.live')),
            any_value(json_type(metadata, '$.key')), any_value(metadata->>'$.tags[0]'),
            any_value(metadata->'$.at.lat')
        FROM '{whole}/captions/*.parquet' WHERE (metadata->'$.speaker')::INT > 6
    """
    assert duckdb.sql(query).fetchall() == [
        (128.5, "UBIGINT", "Ä 'b' \"c\"", "BOOLEAN", "NULL", "a", "47.1"),
    ]


def test_mtime_is_a_timestamp_in_all_tables_that_have_it(whole):
    for table in ("captions", "recordings", "transcripts"):
        schema = pq.read_schema(next((whole / table).glob("*.parquet")))
        assert schema.field("mtime").type == pa.timestamp("us", tz="UTC")
    ((latest,),) = duckdb.sql(f"SELECT max(mtime) FROM '{whole}/recordings/*.parquet'").fetchall()
    assert latest.timestamp() == 1_767_323_045
    no_time = list(write.write_folders([answer(9)._replace(mtime=None)], write.ANSWERS, "memory://none", "run"))
    assert read_table(no_time[0])["mtime"].to_pylist() == [None]


def test_hugging_face_datasets_reads_it(whole, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_parquet(str(whole / "captions" / "*.parquet"), cache_dir=str(tmp_path))
    assert len(found) == 3
    assert json.loads(found[0]["metadata"]) == KINDS
    assert found[0]["mtime"].timestamp() == 1_767_323_045


def test_an_empty_table_has_the_columns_of_one_that_is_not(whole):
    (empty,) = (whole / "transcripts").glob("*.parquet")
    (full,) = (whole / "captions").glob("*.parquet")
    assert pq.read_schema(empty).equals(pq.read_schema(full), check_metadata=True)


def test_a_table_that_has_rows_is_not_filled(whole):
    before = files(whole / "captions")
    write.fill_empty_tables(str(whole), ["captions"], "later")
    assert files(whole / "captions") == before


def test_a_file_that_cannot_be_written_is_an_error_and_the_row_of_its_recording_is_not_there(tmp_path):
    (tmp_path / "dead_letters").touch()  # where a folder should be
    with pytest.raises(storage.StorageError):
        list(write.write_results([result(1, broken=True)], str(tmp_path), "run"))
    assert not (tmp_path / "recordings").exists()


LETTER = DeadLetter(
    "id", "a.wav", Stage.DECODE, Reason.DECODE_ERROR, "broken", False, 1, "pyav", 1.0, 1, None, "{}", "key", "", 0
)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(Reason)), max_size=12))
@settings(max_examples=30)
def test_dead_letters_are_neither_lost_nor_doubled(pairs):
    rows = [
        LETTER._replace(recording_id=f"id{n}", reason=reason, dead_letter_key=f"{n}{reason}") for n, reason in pairs
    ]
    output = "memory://letters"
    fs = fsspec.filesystem("memory")
    if fs.exists("/letters"):
        fs.rm("/letters", recursive=True)
    uris = list(write.write_rows(rows, write.DEAD_LETTER_ROWS, output, "dead_letters", "run"))
    found = [row for uri in uris for row in read_table(uri).to_pylist()]
    assert sorted((row["recording_id"], row["reason"]) for row in found) == sorted(
        {(row.recording_id, row.reason.value) for row in rows}
    )
