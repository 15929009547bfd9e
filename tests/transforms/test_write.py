import random

import apache_beam as beam
import duckdb
import fsspec
import pandas as pd
import polars as pl
import pyarrow.dataset as ds  # noqa: TID251 (a reader elsewhere, of local files)
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.schemas import ANSWER_SCHEMA, Answer, DeadLetter, Reason, Stage, TimedText
from af3pipe.transforms import WriteAnswers, WriteDeadLetters, write
from tests.read_tables import read_table


def answer(number, task="caption"):
    return Answer(
        recording_id=f"id{number}",
        uri=f"s3://archive/Grüße {number}.flac",
        size_bytes=100 + number,
        etag=None,
        mtime="2026-01-02T03:04:05Z",
        segment_index=0,
        start_s=0.0,
        end_s=1.5,
        duration_s=1.5,
        sample_rate=44100,
        channels=2,
        codec="flac",
        peak_dbfs=-3.0,
        rms_dbfs=-21.5,
        clipped_share=0.0,
        silent=False,
        channel="mix",
        stream=None,
        task=task,
        prompt="Describe the audio in detail.",
        history=("What is heard?",),
        question_id=None,
        question=None,
        choices=("yes", "no"),
        text=f"text {number}",
        choice=None,
        segments=(TimedText(0.0, 1.5, f"text {number}"),),
        finish_reason="stop",
        audio_tokens=37,
        prompt_tokens=60,
        new_tokens=5,
        model_id="demo",
        model_revision="r",
        family="AudioFlamingo3",
        engine="transformers",
        dtype="float32",
        decoding="{}",
        answer_key=f"key{number}{task}",
        metadata=(("speaker", "7"),),
        run_id="",
        created_at=1_767_323_045_000_000,
    )


def write_answers(rows, output, run_id="run"):
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | beam.Create(rows) | WriteAnswers(str(output), run_id=run_id)


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
        SELECT text, segments[1].end_s, choices[2], metadata['speaker'], created_at
        FROM '{written}/captions/*.parquet' WHERE uri LIKE '%Grüße 3.flac'
    """
    ((text, end_s, choice, speaker, created_at),) = duckdb.sql(query).fetchall()
    assert (text, end_s, choice, speaker) == ("text 3", 1.5, "no", "7")
    assert created_at.timestamp() == 1_767_323_045


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
    assert dataset.schema.equals(ANSWER_SCHEMA)
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
    monkeypatch.setattr(write, "ROWS_PER_SHARD", 10)
    monkeypatch.setattr(write, "ROWS_PER_FILE", 4)
    write_answers([answer(n) for n in range(95)], tmp_path)
    names = files(tmp_path / "captions")
    assert len(names) >= 10
    assert all(pq.read_metadata(tmp_path / "captions" / name).num_rows <= 4 for name in names)
    found = read_table(tmp_path / "captions")["recording_id"].to_pylist()
    assert sorted(found) == sorted(f"id{n}" for n in range(95))


def test_output_on_an_object_store():
    write_answers([answer(1)], "memory://labels/out")
    found = fsspec.filesystem("memory").find("/labels/out")
    assert [name.rsplit("/", 2)[1] for name in found] == ["captions"]


def test_no_rows_make_no_file(tmp_path):
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        empty = pipeline | beam.Create([]).with_output_types(DeadLetter)
        _ = empty | WriteDeadLetters(str(tmp_path), run_id="run")
    assert list(tmp_path.iterdir()) == []


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
