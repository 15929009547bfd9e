"""Names in an output: Hive folders that other programs read, and files that say which run wrote them."""

import re
from urllib.parse import unquote

import duckdb
import polars as pl
import pyarrow.dataset as ds  # noqa: TID251 (a reader elsewhere, of local files)
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from af3pipe.schemas import RecordingResult
from af3pipe.tables.layout import (
    NO_VALUE,
    check_partition_by,
    check_run_id,
    new_run_id,
    partition_folder,
)
from af3pipe.tables.reader import possible_runs
from af3pipe.tables.write import ANSWERS, fill_empty_tables, write_folders, write_results
from tests import outputs
from tests.outputs import FIRST

STATIONS = ["K Q", "Zürich/1", "a=b", "50%", "K Q", ""]
BY = ("date", "run", "station")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    answers = [outputs.answer_row(number, station=station) for number, station in enumerate(STATIONS)]
    list(write_folders(answers, ANSWERS, str(output), FIRST, BY))
    found = RecordingResult(outputs.recording_row(1, answers[1:2]), (), (outputs.letter_row(9),))
    list(write_results([found], str(output), FIRST, BY))
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


def test_many_partitions_make_one_file_each(tmp_path):
    rows = [outputs.answer_row(number, station=f"s{number % 20}") for number in range(100)]
    assert len(list(write_folders(rows, ANSWERS, str(tmp_path), FIRST, ["station"]))) == 20
    assert len(list(tmp_path.rglob("*.parquet"))) == 20


def folder_of(value):
    return partition_folder(["station"], FIRST, {"station": value})


LONG = "駅" * 28  # quoted, each is nine characters
VALUES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)


@given(VALUES)
@example(LONG)
@example("a" * 121)
@example("😀" * 64)
def test_any_value_is_one_folder_that_a_file_system_takes(value):
    folder = folder_of(value)
    name = folder.removeprefix("station=")
    assert "/" not in folder
    assert len(name) <= 120
    assert len(folder.encode()) <= 255
    if "~" not in name:
        assert unquote(name) == value
    else:
        begin = unquote(name.rpartition("~")[0])
        assert value.startswith(begin) or unquote(name) == value


@given(VALUES, VALUES)
@example("x" * 200, "x" * 201)
@example(LONG, LONG[:-1] + "a")
def test_other_values_have_other_folders(one, other):
    assume(one != other)
    assert folder_of(one) != folder_of(other)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=10))
def test_a_short_value_is_there_in_full(value):
    assert unquote(folder_of(value).removeprefix("station=")) == value


def test_long_values_can_be_written_and_are_read_as_partitions(tmp_path):
    values = [LONG, LONG[:-1] + "前", "x" * 500, "Kyōto"]
    rows = [outputs.answer_row(number, station=value) for number, value in enumerate(values)]
    list(write_folders(rows, ANSWERS, str(tmp_path), FIRST, ["station"]))
    query = f"""
        SELECT text, station, metadata->>'$.station'
        FROM read_parquet('{tmp_path}/captions/**/*.parquet', hive_partitioning = true)
    """
    found = sorted(duckdb.sql(query).fetchall())
    assert [row[2] for row in found] == values, "the whole of it is in the metadata"
    assert len({row[1] for row in found}) == 4
    assert all(re.fullmatch(r"(駅+|x+)~[0-9a-f]{12}", row[1]) for row in found[:3])
    assert found[3][1] == "Kyōto"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (7, "7"),
        (1.5, "1.5"),
        (True, "true"),
        (None, NO_VALUE),
        ("", NO_VALUE),
        (0, "0"),
        (["a", 1], "%5B%22a%22%2C%201%5D"),
    ],
)
def test_a_value_that_is_no_text_has_a_folder(value, name):
    assert folder_of(value) == f"station={name}"
    assert partition_folder(["station"], FIRST, {}) == f"station={NO_VALUE}"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["uri"], "'uri', which is a column of the tables"),
        (["run_id"], "'run_id', which is a column of the tables"),
        (["date", "date"], "names 'date' twice"),
        (["a/b"], "'a/b'; letters, digits"),
        (["a=b"], "'a=b'; letters, digits"),
        (["駅" * 30], "letters, digits"),
        (["source_key"], "'source_key', which is a column of the tables"),
        ([""], "''; letters, digits"),
    ],
)
def test_what_cannot_be_a_partition_is_refused(names, says):
    with pytest.raises(ValueError, match="partition_by") as error:
        check_partition_by(names)
    assert says in str(error.value)


def test_a_run_of_another_name_has_no_day():
    with pytest.raises(ValueError, match="'nightly' begins with none"):
        partition_folder(["date"], "nightly", {})
    assert partition_folder(["run"], "nightly", {}) == "run=nightly"
    assert partition_folder(["date"], "nightly", {}, day="2026-01-02") == "date=2026-01-02"


# --- ids of runs, and their files


@pytest.mark.parametrize(
    "run_id",
    [
        "../escaped",
        "a/b",
        "..",
        ".hidden",
        "",
        "-x",
        "_x",
        "a b",
        "a.b",
        "a\n",
        "Ä",
        "x" * 101,
        "night-20261121T000000Z",
    ],
)
def test_what_cannot_be_a_run_id_is_refused(run_id):
    with pytest.raises(ValueError, match="run_id is") as error:
        check_run_id(run_id)
    assert repr(run_id) in str(error.value)


def test_an_id_that_is_made_can_be_one_and_sorts_by_time():
    first = new_run_id()
    assert check_run_id(first) == first
    assert first != new_run_id()
    assert partition_folder(["date"], first, {}) == f"date={first[:4]}-{first[4:6]}-{first[6:8]}"
    assert check_run_id("night-1") == "night-1"


@st.composite
def run_ids(draw):
    found = draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,40}\Z"))
    found += draw(st.sampled_from(["", "", "-0", "-empty", "-" + "0" * 16, "-20261121T000000Z-x"]))
    try:
        return check_run_id(found)
    except ValueError:
        assume(False)


@given(
    run_ids(), run_ids(), st.sampled_from(["", "-20261121T000000Z"]), st.sampled_from(["0123456789abcdef", "empty"])
)
def test_a_file_is_of_the_run_that_wrote_it_and_of_no_other(run_id, other, pane, behind):
    uri = f"s3://bucket/out/captions/date=2026-01-01/{run_id}{pane}-{behind}.parquet"
    assert run_id in possible_runs(uri)
    assert (other in possible_runs(uri)) == (other == run_id)


def test_the_files_that_are_written_are_those_of_their_run(tmp_path):
    uris = list(write_results([outputs.result(1, broken=True)], str(tmp_path), "night-1"))
    uris += write_results([outputs.result(1)], str(tmp_path), "night-1", pane="-20260102T030000Z")
    fill_empty_tables(str(tmp_path), ["transcripts"], "night-1")
    assert len(uris) == 5
    assert all("night-1" in possible_runs(str(path)) for path in tmp_path.rglob("*.parquet"))
