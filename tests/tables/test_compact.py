import functools
import itertools
import os
import shutil
import socket
import time
from datetime import datetime, timedelta

import duckdb
import polars as pl
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from af3pipe import storage
from af3pipe.pipelines.audit import audit
from af3pipe.schemas import ANSWER_SCHEMA
from af3pipe.storage.parquet import ParquetFile
from af3pipe.tables import compact as module
from af3pipe.tables import write
from af3pipe.tables.compact import CompactError, compact, recover
from af3pipe.tables.compaction_record import Compaction, open_compactions
from af3pipe.tables.latest import latest
from af3pipe.tables.layout import FORMAT_KEY, TABLE_SCHEMAS
from af3pipe.tables.reader import possible_runs, read_batches
from tests import outputs
from tests.kills import killed_after
from tests.outputs import FIRST, SECOND, THIRD, write_run
from tests.read_tables import read_table

TABLES = ("captions", "recordings", "dead_letters")


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "out"
    write_run(folder, FIRST, range(20), broken=range(20, 24), in_files_of=3)
    write_run(folder, SECOND, range(15, 22), version="better", later_s=60)
    return folder


def holding(output):
    """All that holds now, every column of it."""
    view = latest(str(output))
    return {table: sorted(map(repr, view.read(table).to_pylist())) for table in TABLES}


def history(output):
    """All rows that there are, every column of them."""
    return {
        table: sorted(
            repr(row)
            for rows in read_batches(str(output), table, TABLE_SCHEMAS[table].names)
            for row in rows.to_pylist()
        )
        for table in TABLES
    }


def files(output, table):
    return sorted((output / table).rglob("*.parquet"))


def test_many_files_become_one_and_every_row_stays(output):
    before = holding(output)
    rows = history(output)
    done = compact(str(output))
    assert (done.files_before, done.files_after) == (7 + 1 + 8 + 1 + 2, 3)
    assert {table: len(files(output, table)) for table in TABLES} == dict.fromkeys(TABLES, 1)
    assert history(output) == rows
    assert holding(output) == before
    assert audit(str(output)).right
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]


def test_rows_are_sorted_by_recording_and_the_schema_is_the_same(output):
    compact(str(output))
    for table in TABLES:
        (path,) = files(output, table)
        ids = read_table(path)["recording_id"].to_pylist()
        assert ids == sorted(ids)
    schema = pq.read_schema(files(output, "captions")[0])
    assert schema.equals(TABLE_SCHEMAS["captions"])
    assert schema.metadata[FORMAT_KEY] == b"2"
    assert pq.read_metadata(files(output, "captions")[0]).row_group(0).column(0).compression == "ZSTD"


def test_row_groups_and_files_are_cut_as_asked_and_nothing_is_lost(tmp_path, monkeypatch):
    write_run(tmp_path, FIRST, range(300), in_files_of=10)
    before = holding(tmp_path)
    largest = max(path.stat().st_size for path in files(tmp_path, "captions"))
    monkeypatch.setattr("af3pipe.tables.sort.ROWS_PER_GROUP", 40)
    work = module._Compaction
    monkeypatch.setattr(
        module, "_Compaction", lambda output, record, _, beat: work(output, record, 3 * largest, beat)
    )
    compact(str(tmp_path))
    found = [ParquetFile(path) for path in files(tmp_path, "captions")]
    assert 1 < len(found) < 10
    groups = [file.metadata.row_group(n).num_rows for file in found for n in range(file.num_row_groups)]
    assert groups == [40] * 7 + [20]
    ids = [row for file in found for row in file.read(["recording_id"])["recording_id"].to_pylist()]
    assert ids == sorted(ids)  # across the files, too: their names are in this order
    assert holding(tmp_path) == before


def test_what_is_large_already_or_alone_stays_as_it_is(output):
    compact(str(output))
    names = {table: files(output, table) for table in TABLES}
    done = compact(str(output))
    assert done.compaction_id is None
    assert {table: files(output, table) for table in TABLES} == names
    assert open_compactions(str(output)) == []


def test_rows_that_are_there_twice_are_dropped_the_newest_kept(output):
    again = [outputs.answer_row(n, text=f"otherwise {n}", created_at=2_000_000_000_000_000) for n in (1, 2)]
    again.append(outputs.answer_row(3, created_at=2_000_000_000_000_000))
    outputs.write_rows(output, SECOND, write.ANSWERS, again)
    done = compact(str(output))
    assert (done.duplicates, done.differing) == (3, 2)
    texts = read_table(output / "captions")["text"].to_pylist()
    assert len(texts) == 27
    assert {"otherwise 1", "otherwise 2"} <= set(texts)
    assert not {"heard 1 ", "heard 2 "} & set(texts)


def test_latest_drops_what_no_longer_holds_and_the_books_stay_right(output):
    before = holding(output)
    done = compact(str(output), only_latest=True)
    assert done.superseded == 5 + 2 + 7  # answers, dead letters and rows of recordings/ of the first run
    assert holding(output) == before
    assert read_table(output / "captions").num_rows == 22
    assert read_table(output / "recordings").num_rows == 24
    report = audit(str(output))
    assert (report.problems, report.notes) == ([], [])
    write_run(output, THIRD, range(24), version="3", later_s=120)
    assert compact(str(output), only_latest=True).superseded == 22 + 24 + 2
    report = audit(str(output))  # dropped twice over, and the records of the runs still fit
    assert (report.problems, report.notes) == ([], [])
    assert read_table(output / "dead_letters").num_rows == 0


def test_files_of_a_run_that_has_not_finished_are_left_alone(output):
    write_run(output, THIRD, range(3), version="3", later_s=120, finished=False)
    mine = {path: path.read_bytes() for path in output.rglob(f"{THIRD}*.parquet")}
    before = holding(output)
    done = compact(str(output), only_latest=True)
    assert done.left_alone == len(mine) == 2
    assert {path: path.read_bytes() for path in mine} == mine
    assert holding(output) == before
    # Should the third come to nothing, what held before it is still there.
    for path in mine:
        path.unlink()
    assert len(latest(str(output)).read("captions")) == 22
    assert len(latest(str(output)).read("recordings")) == 24


def test_what_only_an_unfinished_run_names_stays(output):
    # Recordings that are again what they were for the first run: the third names its rows, and may yet finish.
    write_run(output, THIRD, range(15, 20), kept=True, later_s=120, finished=False)
    before = holding(output)
    compact(str(output), only_latest=True)
    assert holding(output) == before


def test_files_of_an_unfinished_run_are_taken_when_told_to(output):
    write_run(output, THIRD, range(3), version="3", later_s=120, finished=False)
    before = holding(output)
    assert compact(str(output), include_unfinished=True).left_alone == 0
    assert len(files(output, "captions")) == 1
    assert holding(output) == before


def test_files_that_come_meanwhile_stay(output, monkeypatch):
    put = module._Compaction._put

    def put_and_let_another_run_write(self, *args):
        put(self, *args)
        write_run(output, THIRD, range(3), version="3", later_s=120)

    monkeypatch.setattr(module._Compaction, "_put", put_and_let_another_run_write)
    compact(str(output))
    assert len(list(output.rglob(f"{THIRD}*.parquet"))) == 2
    assert audit(str(output)).right


def test_each_partition_stays_a_folder_of_its_own(tmp_path):
    for run_id, later_s in ((FIRST, 0), (SECOND, 60)):
        write_run(tmp_path, run_id, range(20), version=run_id, later_s=later_s, partition_by=("date", "station"))
    before = holding(tmp_path)
    compact(str(tmp_path))
    folders = [str(path.parent.relative_to(tmp_path / "captions")) for path in files(tmp_path, "captions")]
    assert folders == ["date=2026-01-01/station=K%20Q", "date=2026-01-02/station=K%20Q"]
    assert holding(tmp_path) == before


def test_tables_without_rows_keep_a_file(tmp_path):
    for name in ("a", "b"):
        path = tmp_path / "captions" / f"{FIRST}-{name}.parquet"
        storage.write_atomic(str(path), b"")
        pq.write_table(ANSWER_SCHEMA.empty_table(), path)
    write_run(tmp_path, FIRST, [])
    compact(str(tmp_path))
    (path,) = files(tmp_path, "captions")
    assert read_table(path).num_rows == 0


def test_other_programs_read_what_is_compacted(output):
    compact(str(output))
    path = f"{output}/captions/*.parquet"
    assert duckdb.sql(f"SELECT count(DISTINCT text) FROM '{path}'").fetchall() == [(27,)]
    assert pl.read_parquet(path).height == 27
    assert pc.count_distinct(read_table(output / "captions")["answer_key"]).as_py() == 27


def test_a_row_of_an_older_version_gets_nulls(output):
    path = files(output, "captions")[0]
    table = read_table(path)
    pq.write_table(table.drop_columns(["history"]), path)
    assert latest(str(output)).read("captions")["history"].null_count == len(table)
    compact(str(output))
    found = read_table(output / "captions")
    assert found.num_rows == 27
    assert found["history"].null_count == len(table)


@pytest.mark.representative
def test_killed_after_any_write_or_delete_no_row_is_lost_or_double(tmp_path):
    output = tmp_path / "out"
    write_run(output, FIRST, range(6), broken=[6, 7], in_files_of=4)
    write_run(output, SECOND, range(4, 7), version="better", later_s=60)
    before, after = holding(output), []
    for number in itertools.count():
        copy = tmp_path / f"copy{number}"
        shutil.copytree(output, copy)
        killed = killed_after(number, functools.partial(compact, str(copy), only_latest=True))
        assert holding(copy) == before, number
        report = audit(str(copy))
        assert report.right, (number, report.problems)
        states = [found.state for found in open_compactions(str(copy))]
        after.append(states)
        assert bool(states) == (killed and number > 0)
        recover(str(copy))
        assert open_compactions(str(copy)) == []
        assert holding(copy) == before, number
        assert audit(str(copy)).right
        raw = {table: read_table(copy / table).num_rows for table in TABLES}
        done = {"captions": 7, "recordings": 8, "dead_letters": 1}
        undone = {"captions": 9, "recordings": 11, "dead_letters": 2}
        assert raw == (done if states == ["committed"] or not killed else undone)
        compact(str(copy), only_latest=True)
        assert {table: read_table(copy / table).num_rows for table in TABLES} == done
        if not killed:
            break
    assert ["writing"] in after
    assert ["committed"] in after
    assert len(after) > 15


def test_a_second_compaction_refuses_while_the_first_writes(output):
    other = Compaction("20260101T000000Z-ffffff", "writing", time.time() - 120, "elsewhere", 77)
    other.write(str(output))
    two_minutes_ago = time.time() - 120
    os.utime(other.uri(str(output)), (two_minutes_ago, two_minutes_ago))
    with pytest.raises(
        CompactError, match=r"by process 77 on elsewhere, which was last seen alive 2 min ago.* 60 min"
    ):
        compact(str(output))
    assert [found.compaction_id for found in open_compactions(str(output))] == [other.compaction_id]
    assert compact(str(output), dead_after_s=60).recovered == 1


def test_one_of_this_machine_whose_process_lives_is_waited_for(output):
    other = Compaction("20260101T000000Z-ffffff", "writing", time.time(), socket.gethostname(), os.getpid())
    other.write(str(output))
    assert recover(str(output)) == []


def test_a_compaction_that_was_taken_for_killed_gives_up(output, monkeypatch):
    before = holding(output)
    put = module._Compaction._put

    def put_and_be_undone(self, *args):
        put(self, *args)
        assert recover(str(output), dead_after_s=0.0)

    monkeypatch.setattr(module._Compaction, "_put", put_and_be_undone)
    with pytest.raises(CompactError, match="considered this compaction dead"):
        compact(str(output))
    monkeypatch.undo()
    assert holding(output) == before
    assert open_compactions(str(output)) == []
    assert audit(str(output)).right


def test_an_error_while_writing_leaves_all_as_it_was(output, monkeypatch):
    names = {table: files(output, table) for table in TABLES}
    victim = files(output, "recordings")[0]
    monkeypatch.setattr(module.SortedRows, "groups", lambda self: iter([]) if 1 / 0 else None)
    with pytest.raises(ZeroDivisionError):
        compact(str(output))
    assert victim.exists()
    assert {table: files(output, table) for table in TABLES} == names
    assert open_compactions(str(output)) == []


def test_leftovers_of_killed_writes_go_when_they_are_a_day_old(output):
    old, young = output / "captions" / ".0af3.tmp", output / "captions" / ".1af3.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    past = (datetime.now() - timedelta(days=2)).timestamp()
    os.utime(old, (past, past))
    assert compact(str(output)).temporary == 1
    assert (old.exists(), young.exists()) == (False, True)


def test_a_file_is_of_its_run_whatever_pane_it_is():
    run = "20261121T222051Z-9accc5"
    assert possible_runs(f"s3://out/captions/{run}-0c97898e53d72a52.parquet") == (run,)
    assert run in possible_runs(f"s3://out/captions/{run}-20261121T094000Z-0c97898e53d72a52.parquet")
    assert possible_runs("s3://out/captions/compacted-1-0c97898e53d72a52.parquet") == ()
