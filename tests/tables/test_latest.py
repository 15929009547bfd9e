import pytest

from af3pipe.tables import write
from af3pipe.tables.compact import compact
from af3pipe.tables.latest import NotATable, export_latest, latest, table_files
from tests import outputs
from tests.outputs import FIRST, SECOND, THIRD, write_run


def texts(output):
    return sorted(latest(str(output)).read("captions", ["text"])["text"].to_pylist())


def test_the_rows_of_one_run_hold(tmp_path):
    write_run(tmp_path, FIRST, range(20), broken=range(20, 23))
    assert texts(tmp_path) == sorted(f"heard {n} " for n in range(20))
    assert len(latest(str(tmp_path)).read("dead_letters")) == 3
    assert len(latest(str(tmp_path)).read("recordings")) == 23


def test_a_later_run_supersedes_what_it_asked_anew(tmp_path):
    write_run(tmp_path, FIRST, range(10), broken=[10])
    write_run(tmp_path, SECOND, [3, 10], version="better", later_s=60)
    assert texts(tmp_path) == sorted(
        [*(f"heard {n} " for n in range(10) if n != 3), "heard 3 better", "heard 10 better"]
    )
    assert len(latest(str(tmp_path)).read("dead_letters")) == 0
    assert len(latest(str(tmp_path)).read("recordings")) == 11


def test_rows_that_a_later_run_kept_hold_still(tmp_path):
    write_run(tmp_path, FIRST, range(10), broken=[10])
    write_run(tmp_path, SECOND, range(10), broken=[10], kept=True, later_s=60)
    assert texts(tmp_path) == sorted(f"heard {n} " for n in range(10))
    assert len(latest(str(tmp_path)).read("dead_letters")) == 1
    assert set(latest(str(tmp_path)).read("recordings")["run_id"].to_pylist()) == {SECOND}


def test_of_rows_of_one_moment_the_later_run_s_holds(tmp_path):
    for run_id in (SECOND, FIRST):
        write_run(tmp_path, run_id, range(3), version=run_id)
    assert texts(tmp_path) == [f"heard {n} {SECOND}" for n in range(3)]
    compact(str(tmp_path))
    write_run(tmp_path, THIRD, range(3), version=THIRD)  # in files that are listed before the compacted ones
    assert texts(tmp_path) == [f"heard {n} {THIRD}" for n in range(3)]


def test_a_row_that_is_there_twice_holds_once_the_newest(tmp_path):
    write_run(tmp_path, FIRST, range(5))
    again = [outputs.answer_row(n, text="once more", created_at=2_000_000_000_000_000) for n in range(5)]
    outputs.write_rows(tmp_path, SECOND, write.ANSWERS, again)
    assert texts(tmp_path) == ["once more"] * 5


def test_an_answer_holds_for_its_own_recording_only(tmp_path):
    write_run(tmp_path, FIRST, range(2))
    other = outputs.answer_row(0)._replace(recording_id="another")  # the same work, for a recording without a row
    outputs.write_rows(tmp_path, SECOND, write.ANSWERS, [other])
    assert len(texts(tmp_path)) == 2


def test_large_files_are_read_in_pieces(tmp_path, monkeypatch):
    write_run(tmp_path, FIRST, range(50), in_files_of=50)
    whole = texts(tmp_path)
    monkeypatch.setattr("af3pipe.tables.reader._SMALL_BYTES", 0)
    assert texts(tmp_path) == whole


def test_keys_that_come_in_many_pieces_meet_their_rows(tmp_path, monkeypatch):
    write_run(tmp_path, FIRST, range(50), broken=range(50, 60))
    monkeypatch.setattr("af3pipe.tables.keys._KEYS_AT_ONCE", 8)
    assert len(texts(tmp_path)) == 50


def test_nothing_holds_where_nothing_is(tmp_path):
    assert latest(str(tmp_path)).read("captions").num_rows == 0


def test_a_file_that_is_no_table_is_named(tmp_path):
    write_run(tmp_path, FIRST, range(5))
    (victim,) = (tmp_path / "captions").iterdir()
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(NotATable, match=victim.name):
        latest(str(tmp_path)).read("captions")


def test_a_relative_folder_is_the_same(tmp_path, monkeypatch):
    write_run(tmp_path / "out", FIRST, range(5))
    monkeypatch.chdir(tmp_path)
    assert len(table_files("out")["captions"]) == 1
    assert len(texts("out")) == 5


def test_export_writes_what_holds(tmp_path):
    write_run(tmp_path / "out", FIRST, range(5))
    write_run(tmp_path / "out", SECOND, [1], version="better", later_s=9)
    written = export_latest(str(tmp_path / "out"), str(tmp_path / "clean"), ["captions", "transcripts", "recordings"])
    assert {name.rpartition("/")[2]: rows for name, rows in written.items()} == {
        "captions.parquet": 5,
        "recordings.parquet": 5,
    }
