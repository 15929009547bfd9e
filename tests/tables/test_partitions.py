"""Hive folders: what is in their names, and that the programs which read such tables read ours."""

import apache_beam as beam
import duckdb
import polars as pl
import pyarrow.dataset as ds  # noqa: TID251 (a reader elsewhere, of local files)
import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.tables.layout import NO_VALUE, check_partition_by, partition_folder
from af3pipe.tables.write import fill_empty_tables
from af3pipe.transforms import WriteAnswers, WriteDeadLetters, WriteRecordings
from tests import outputs
from tests.outputs import FIRST

STATIONS = ["K Q", "Zürich/1", "a=b", "50%", "K Q", ""]
BY = ("date", "run", "station")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    answers = [outputs.answer_row(number, station=station) for number, station in enumerate(STATIONS)]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | beam.Create(answers) | WriteAnswers(str(output), run_id=FIRST, partition_by=BY)
        letters = pipeline | "Letters" >> beam.Create([outputs.letter_row(9)])
        _ = letters | WriteDeadLetters(str(output), run_id=FIRST, partition_by=BY)
        results = pipeline | "Results" >> beam.Create([outputs.recording_row(1, answers[1:2])])
        _ = results | WriteRecordings(str(output), run_id=FIRST, partition_by=BY)
    return output


def test_each_value_has_its_folder(written):
    day = f"captions/date=2026-01-01/run={FIRST}"
    folders = {str(path.parent.relative_to(written)) for path in written.glob("captions/**/*.parquet")}
    assert folders == {
        f"{day}/station=K%20Q",
        f"{day}/station=Z%C3%BCrich%2F1",
        f"{day}/station=a%3Db",
        f"{day}/station=50%25",
        f"{day}/station={NO_VALUE}",
    }


def test_dead_letters_and_recordings_have_the_folders_of_their_recording(written):
    for table in ("dead_letters", "recordings"):
        (path,) = (written / table).rglob("*.parquet")
        assert path.parent == written / table / "date=2026-01-01" / f"run={FIRST}" / "station=K%20Q"


EXPECTED = sorted((f"heard {number} ", station or None) for number, station in enumerate(STATIONS))


def test_pyarrow_reads_the_partitions(written):
    table = ds.dataset(written / "captions", partitioning="hive").to_table()
    assert sorted(zip(table["text"].to_pylist(), table["station"].to_pylist(), strict=True)) == EXPECTED
    assert set(table["date"].cast("string").to_pylist()) == {"2026-01-01"}


def test_duckdb_reads_the_partitions(written):
    query = f"""
        SELECT text, station, date::VARCHAR, run
        FROM read_parquet('{written}/captions/**/*.parquet', hive_partitioning = true)
    """
    rows = duckdb.sql(query).fetchall()
    assert sorted(row[:2] for row in rows) == EXPECTED
    assert {row[2:] for row in rows} == {("2026-01-01", FIRST)}


def test_polars_reads_the_partitions(written):
    frame = pl.scan_parquet(written / "captions", hive_partitioning=True).collect()
    assert sorted(zip(frame["text"], frame["station"], strict=True)) == EXPECTED


def test_an_empty_table_has_folders_too_so_that_a_later_night_can_be_read_with_it(tmp_path):
    fill_empty_tables(str(tmp_path), ["captions"], FIRST, BY)
    outputs.write_run(tmp_path, outputs.SECOND, range(3), partition_by=BY)
    query = f"SELECT run, station FROM read_parquet('{tmp_path}/captions/**/*.parquet', hive_partitioning = true)"
    assert duckdb.sql(query).fetchall() == [(outputs.SECOND, "K Q")] * 3


def test_many_partitions_make_one_file_each(tmp_path, monkeypatch):
    monkeypatch.setattr("af3pipe.transforms.write.ROWS_PER_SHARD", 10)
    rows = [outputs.answer_row(number, station=f"s{number % 20}") for number in range(100)]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | beam.Create(rows) | WriteAnswers(str(tmp_path), run_id=FIRST, partition_by=["station"])
    assert len(list(tmp_path.rglob("*.parquet"))) == 20


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_any_value_is_one_folder_that_names_it(value):
    from urllib.parse import unquote

    folder = partition_folder(["station"], FIRST, {"station": value})
    assert "/" not in folder
    assert unquote(folder.removeprefix("station=")) == value


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["uri"], "'uri', which is a column of the tables"),
        (["run_id"], "'run_id', which is a column of the tables"),
        (["date", "date"], "names 'date' twice"),
        (["a/b"], "'a/b'; letters, digits"),
        (["a=b"], "'a=b'; letters, digits"),
        ([""], "''; letters, digits"),
    ],
)
def test_what_cannot_be_a_partition_is_refused(names, says):
    with pytest.raises(ValueError, match="partition_by") as error:
        check_partition_by(names)
    assert says in str(error.value)
    with pytest.raises(ValueError, match="partition_by"):
        WriteAnswers("out", partition_by=names)


def test_a_run_of_another_name_has_no_day():
    with pytest.raises(ValueError, match="'nightly' begins with none"):
        WriteAnswers("out", run_id="nightly", partition_by=["date"])
    assert partition_folder(["run"], "nightly", {}) == "run=nightly"
