import itertools
import os
import shutil

import pyarrow.parquet as pq
import pytest

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected
from af3pipe.storage import ObjectInfo
from af3pipe.tables import write
from af3pipe.tables.compact import compact
from af3pipe.tables.formats import NotATable
from af3pipe.tables.latest import latest
from af3pipe.tables.reader import (
    possible_runs,
    read_batches,
    read_file,
    read_rows_of,
    retried,
    rows_of_run,
    run_files,
    run_prefix,
    table_files,
)
from tests import outputs
from tests.outputs import FIRST, SECOND, THIRD, write_run
from tests.read_tables import read_table

TABLES = ("captions", "recordings", "dead_letters")


@pytest.fixture
def output(tmp_path, monkeypatch):
    """Files that are read one after the other, so that others can change while they are."""
    folder = tmp_path / "out"
    write_run(folder, FIRST, range(20), broken=range(20, 24), in_files_of=3)
    write_run(folder, SECOND, range(15, 22), version="better", later_s=60, in_files_of=3)
    monkeypatch.setattr("af3pipe.tables.reader._SMALL_BYTES", 0)
    return folder


def keys(rows, table):
    columns = {"captions": ("recording_id", "answer_key"), "recordings": ("recording_id", "run_id")}
    return sorted(
        tuple(row[name] for name in columns.get(table, ("dead_letter_key", "run_id")))
        for piece in rows
        for row in piece.to_pylist()
    )


@pytest.mark.parametrize("only_latest", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_the_view_is_the_same_whenever_a_compaction_replaces_its_files(output, table, only_latest):
    wanted = keys(latest(str(output)).batches(table), table)
    for number in (1, 4):
        copy = output.with_name(f"copy{number}")
        shutil.copytree(output, copy)
        pieces = latest(str(copy)).batches(table)
        found = list(itertools.islice(pieces, number))
        compact(str(copy), only_latest=only_latest)
        found += pieces
        assert keys(found, table) == wanted, number


def test_a_view_that_a_compaction_and_a_run_change_meanwhile_has_no_row_twice(output):
    pieces = latest(str(output)).batches("captions", ["recording_id", "answer_key", "text"])
    found = [next(pieces), next(pieces)]
    write_run(output, THIRD, range(24), version="3", later_s=120, in_files_of=3)
    compact(str(output))
    found += pieces
    # The answers that were named when the reading began.
    assert keys(found, "captions") == keys(latest_of(output, FIRST, SECOND), "captions")


def latest_of(output, *runs):
    copy = output.with_name("older")
    shutil.copytree(output, copy)
    for path in copy.rglob("*.parquet"):
        rows = read_table(path)
        pq.write_table(rows.filter([run in runs for run in rows["run_id"].to_pylist()]), path)
    return latest(str(copy)).batches("captions", ["recording_id", "answer_key"])


@pytest.mark.parametrize("table", TABLES)
def test_no_row_of_the_history_is_lost_whenever_a_compaction_replaces_its_files(output, table):
    wanted = keys(read_batches(str(output), table), table)
    assert len(wanted) == {"captions": 27, "recordings": 31, "dead_letters": 4}[table]
    for number in (1, 4):
        copy = output.with_name(f"copy{number}")
        shutil.copytree(output, copy)
        pieces = read_batches(str(copy), table)
        found = list(itertools.islice(pieces, number))
        compact(str(copy))
        found += pieces
        assert sorted(set(keys(found, table))) == wanted, number


def test_a_worker_reads_a_file_that_compactions_have_replaced_twice(output):
    listed = table_files(str(output))["captions"]
    rows = {info: keys(read_file(str(output), "captions", info), "captions") for info in listed}
    for later_s in (120, 180):
        compact(str(output))
        write_run(output, THIRD, [0], version=str(later_s), later_s=later_s)
    compact(str(output))
    for info, wanted in rows.items():
        found = list(read_file(str(output), "captions", info, ["recording_id", "answer_key"]))
        assert set(keys(found, "captions")) >= set(wanted)
        (run_id,) = possible_runs(info.uri)
        runs = {
            run
            for piece in read_file(str(output), "captions", info, ["run_id"])
            for run in piece["run_id"].to_pylist()
        }
        assert runs == {run_id}


def test_a_file_that_is_lost_and_not_replaced_is_an_error(output):
    compact(str(output))
    gone = ObjectInfo(str(output / "captions" / f"{FIRST}-{'0' * 16}.parquet"), 1, None, None)
    with pytest.raises(Rejected) as caught:
        list(read_file(str(output), "captions", gone))
    assert caught.value.reason is Reason.NOT_FOUND


def test_work_on_listed_files_begins_again_where_one_has_vanished(output):
    turns = []

    def work(files):
        turns.append(len(files["captions"]))
        if len(turns) == 1:
            compact(str(output))
        return keys((rows for _, _, rows in read_rows_of(files["captions"], "captions")), "captions")

    assert len(retried(str(output), work)) == 27
    assert turns == [10, 1]


def test_a_run_owns_its_own_files_only(tmp_path):
    for run_id, count in (("night-1", 3), ("night-10", 5), ("night", 7)):
        outputs.write_rows(tmp_path, run_id, write.ANSWERS, [outputs.answer_row(n, run_id) for n in range(count)])
    for run_id, count in (("night-1", 3), ("night-10", 5), ("night", 7)):
        for prefix in ("", run_prefix(run_id, ())):
            files = run_files(str(tmp_path), "captions", run_id, prefix)
            assert sum(pq.read_metadata(info.uri).num_rows for info in files) == count
        assert len(keys(rows_of_run(str(tmp_path), "captions", run_id), "captions")) == count


def test_files_of_a_stream_s_windows_are_the_run_s(tmp_path):
    rows = [outputs.answer_row(0)]
    list(write.write_rows(rows, write.ANSWERS, str(tmp_path), "captions", FIRST, pane="-20261121T094000Z"))
    assert len(run_files(str(tmp_path), "captions", FIRST, run_prefix(FIRST, ()))) == 1
    assert run_files(str(tmp_path), "captions", SECOND) == []


@pytest.mark.parametrize(
    ("partition_by", "day", "prefix"),
    [
        ((), None, f"{FIRST}-"),
        (("run",), None, f"run={FIRST}/{FIRST}-"),
        (("date", "station"), "2026-01-01", "date=2026-01-01/"),
        (("date", "station"), None, ""),
        (("station", "run"), None, ""),
    ],
)
def test_as_much_of_the_path_as_is_known_is_listed(tmp_path, partition_by, day, prefix):
    for run_id in (FIRST, SECOND):
        write_run(tmp_path, run_id, range(5), partition_by=partition_by)
    assert run_prefix(FIRST, partition_by, day) == prefix
    files = run_files(str(tmp_path), "captions", FIRST, prefix)
    assert files == [info for info in table_files(str(tmp_path))["captions"] if FIRST in storage.name(info.uri)]
    assert len(files) == 1
    listed = storage.find_files(str(tmp_path / "captions"), prefix)
    assert len(listed) == (1 if prefix else 2)


def test_files_by_prefix_on_a_store_without_folders():
    for name in ("out/captions/a-1.parquet", "out/captions/a/b-1.parquet", "out/captions/b-1.parquet", "out/a-1"):
        storage.write_atomic(f"memory://prefixes/{name}", b"")
    found = [info.uri for info in storage.find_files("memory://prefixes/out/captions", "a-")]
    assert [storage.name(uri) for uri in found] == ["a-1.parquet"]
    assert [storage.name(info.uri) for info in storage.find_files("memory://prefixes/out/captions", "a/")] == [
        "b-1.parquet"
    ]
    assert storage.find_files("memory://prefixes/out/nothing", "a-") == []


def test_files_of_a_committed_compaction_are_known_when_a_run_s_are_listed(output, monkeypatch):
    monkeypatch.setattr("af3pipe.tables.compaction._finish", lambda *_: None)  # killed before it deletes anything
    compact(str(output))
    assert len(list((output / "captions").glob(f"{FIRST}*"))) == 7
    assert run_files(str(output), "captions", FIRST, run_prefix(FIRST, ())) == []
    assert len(keys(rows_of_run(str(output), "captions", FIRST), "captions")) == 20


def test_a_file_of_another_program_is_named(output):
    path = output / "captions" / "mine.parquet"
    pq.write_table(read_table(output / "dead_letters").select(["uri", "run_id"]), path)
    with pytest.raises(NotATable, match=r"mine.parquet has no column answer_key: another program wrote it"):
        latest(str(output)).read("captions")
    os.truncate(path, 100)
    with pytest.raises(NotATable, match=r"mine.parquet is damaged"):
        list(read_batches(str(output), "captions"))
