"""What may happen while a compaction runs: no row is lost, whoever else writes, compacts or is killed, and when."""

import functools
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af3pipe import storage
from af3pipe.pipelines.audit import audit
from af3pipe.tables import compact as module
from af3pipe.tables import compaction
from af3pipe.tables.compact import CompactError, compact, recover
from af3pipe.tables.compaction_record import Compaction, Compactions, done_compactions, open_compactions
from af3pipe.tables.heartbeat import Heartbeat, silent_s
from af3pipe.tables.latest import latest
from tests.outputs import FIRST, SECOND, THIRD, write_run
from tests.read_tables import read_table

TABLES = ("captions", "recordings", "dead_letters")
DURING = ("_put", "_check_unused", "_check_new")


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "out"
    write_run(folder, FIRST, range(6), broken=[6, 7], in_files_of=4)
    write_run(folder, SECOND, range(4, 7), version="better", later_s=60)
    return folder


def view(output):
    found = latest(str(output))
    return {table: sorted(map(repr, found.read(table).to_pylist())) for table in TABLES}


def before(monkeypatch, owner, name, work):
    """Has `work` done once, before a function is called for the first time."""
    function, done = getattr(owner, name), []

    def hooked(*args, **more):
        if not done:
            done.append(True)
            work()
        return function(*args, **more)

    monkeypatch.setattr(owner, name, hooked)


def rewrite(path):
    """A bundle that is tried again writes the same rows under the same name, which the model may have worded anew."""
    rows = read_table(path)
    texts = [f"again {text}" for text in rows["text"].to_pylist()]
    at = [time.replace(year=2030) for time in rows["created_at"].to_pylist()]
    for name, values in (("text", texts), ("created_at", at)):
        number = rows.schema.get_field_index(name)
        field = rows.schema.field(number)
        rows = rows.set_column(number, field, pa.array(values, field.type))
    storage.write_atomic(str(path), _bytes(rows))


def _bytes(rows):
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer)
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize("owner", [module._Compaction, compaction], ids=["while it writes", "after its commit"])
def test_a_file_that_is_written_again_is_not_deleted(output, monkeypatch, owner):
    victim = sorted((output / "captions").glob(f"{FIRST}*"))[0]
    size = len(read_table(victim))
    before(monkeypatch, owner, "_put" if owner is not compaction else "_finish", lambda: rewrite(victim))
    compact(str(output))
    assert victim.exists()
    texts = latest(str(output)).read("captions", ["text"])["text"].to_pylist()
    assert len(texts) == 7
    assert {problem.kind for problem in audit(str(output)).problems} == {"duplicate"}
    again = [text for text in read_table(output / "captions", ["text"])["text"].to_pylist() if text[:6] == "again "]
    assert len(again) == size
    monkeypatch.undo()
    assert compact(str(output)).duplicates == size
    assert audit(str(output)).right
    assert {text for text in again if "better" in text} <= set(texts)


@pytest.mark.parametrize("name", DURING[:2])
def test_a_row_that_a_run_takes_over_meanwhile_is_not_dropped(output, monkeypatch, name):
    def run_again():
        # The third asks the first prompt again, whose answers are there.
        write_run(output, THIRD, range(4, 6), kept=True, later_s=120)

    before(monkeypatch, module._Compaction, name, run_again)
    with pytest.raises(CompactError, match=rf"{THIRD}.*parquet was written meanwhile, and references rows"):
        compact(str(output), only_latest=True)
    assert open_compactions(str(output)) == []
    assert audit(str(output)).right
    assert len(latest(str(output)).read("captions")) == 7


def test_rows_that_come_meanwhile_and_name_what_stays_are_no_reason_to_stop(output, monkeypatch):
    before(monkeypatch, module._Compaction, "_put", lambda: write_run(output, THIRD, [0, 1], kept=True, later_s=120))
    compact(str(output), only_latest=True)
    assert audit(str(output)).right


class Turns:
    """Stops a thread before one of its calls of the store, until it is told to go on."""

    def __init__(self, monkeypatch):
        self.counts, self._stops = {}, {}
        for name in ("write_atomic", "delete", "find_files", "read_bytes", "stat"):
            monkeypatch.setattr(storage, name, self._counted(getattr(storage, name)))
        monkeypatch.setattr(compaction, "each", lambda function, items: map(function, list(items)))

    def _counted(self, function):
        @functools.wraps(function)
        def call(*args, **more):
            name = threading.current_thread().name
            number = self.counts[name] = self.counts.get(name, 0) + 1
            stop, reached, go_on = self._stops.get(name, (0, None, None))
            if number == stop:
                reached.set()
                assert go_on.wait(30)
            return function(*args, **more)

        return call

    def start(self, name, work, stop):
        """Runs `work` up to the call of this number, or to its end; returns what lets it go on to its end."""
        self.counts[name] = 0
        reached, go_on, errors = threading.Event(), threading.Event(), []
        self._stops[name] = (stop, reached, go_on)

        def run():
            try:
                work()
            except CompactError as error:
                errors.append(error)
            finally:
                reached.set()

        thread = threading.Thread(target=run, name=name)
        thread.start()
        assert reached.wait(30)

        def finish():
            go_on.set()
            thread.join()
            return errors

        return finish


def interleave(output, folder, turns, first, second):
    """A compaction stops at a call; a process that takes it for dead stops at one of its own; they go on in turn."""
    wanted = view(output)
    copy = folder / f"{first}-{second}"
    shutil.copytree(output, copy)
    finish_compact = turns.start("compact", lambda: compact(str(copy), only_latest=True), first)
    finish_recover = turns.start("recover", lambda: recover(str(copy), dead_after_s=0.0), second)
    assert view(copy) == wanted, (first, second)
    errors = finish_compact()
    assert view(copy) == wanted, (first, second)
    finish_recover()
    assert view(copy) == wanted, (first, second)
    recover(str(copy), dead_after_s=0.0)
    assert open_compactions(str(copy)) == []
    assert view(copy) == wanted, (first, second)
    report = audit(str(copy))
    assert report.right, (first, second, report.problems)
    shutil.rmtree(copy)
    return bool(errors)


def grid(output, folder, turns, step):
    turns.start("compact", lambda: compact(str(shutil.copytree(output, folder / "whole")), only_latest=True), 0)()
    calls = turns.counts["compact"]
    assert calls > 30
    ends = [
        interleave(output, folder, turns, first, second)
        for first in range(2, calls + 1)
        for second in range(1, 30)
        if (first * 31 + second) % step == 0
    ]
    assert {True, False} == set(ends)


def test_a_compaction_that_is_taken_for_dead_and_lives_loses_nothing(output, tmp_path, monkeypatch):
    grid(output, tmp_path, Turns(monkeypatch), step=397)


@pytest.mark.slow
def test_whatever_call_they_are_stopped_at(output, tmp_path, monkeypatch):
    grid(output, tmp_path, Turns(monkeypatch), step=23)


def lost_by_hand(output, monkeypatch):
    """A compaction that was killed after its commit, in the middle of its deletions."""
    monkeypatch.setattr(compaction, "_kept", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compact(str(output))
    monkeypatch.undo()
    (record,) = open_compactions(str(output))
    assert record.state == "committed"
    return record


def test_a_commit_whose_new_files_are_not_all_there_does_not_count(output, monkeypatch):
    wanted = view(output)
    record = lost_by_hand(output, monkeypatch)
    (output / record.new[0]).unlink()  # by an undo that was killed, too
    assert view(output) == wanted
    recover(str(output), dead_after_s=0.0)
    assert open_compactions(str(output)) == []
    assert not list(output.rglob("compacted-*"))
    assert view(output) == wanted


def test_where_old_and_new_files_are_lost_nothing_more_is(output, monkeypatch):
    record = lost_by_hand(output, monkeypatch)
    captions = [name for name in record.new if name.startswith("captions/")]
    (output / captions[0]).unlink()
    max((output / "captions").glob(f"{FIRST}*"), key=lambda path: len(read_table(path))).unlink()
    left = set(latest(str(output)).read("captions", ["text"])["text"].to_pylist())
    assert 3 <= len(left) < 7
    with pytest.raises(CompactError, match=r"compacted-.*parquet, which the compaction .* wrote, is missing"):
        compact(str(output), dead_after_s=0.0)
    Path(record.uri(str(output))).unlink()
    compact(str(output))
    assert set(latest(str(output)).read("captions", ["text"])["text"].to_pylist()) == left


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def running(output):
    """A compaction of this process, which began two hours ago and has written nothing since."""
    record = compaction.begin(str(output))
    age(record.uri(str(output)), 7200)
    return record


def test_a_compaction_that_takes_hours_over_one_file_is_alive(output):
    record = running(output)
    assert silent_s(str(output), record, Compactions(str(output))) > 7000
    alive = Path(record.uri_beside(str(output), "alive"))
    with Heartbeat(str(output), record, every_s=0.01):
        while not alive.exists():
            time.sleep(0.01)
    assert silent_s(str(output), record, Compactions(str(output))) < 3600
    with pytest.raises(CompactError, match="was last seen alive 0 min ago"):
        compact(str(output))


def test_the_clock_of_no_machine_says_that_a_compaction_is_dead(output, monkeypatch):
    record = compaction.begin(str(output))
    now = time.time
    for skew_s in (-86_400, 86_400):
        monkeypatch.setattr(time, "time", lambda skew_s=skew_s: now() + skew_s)
        assert recover(str(output)) == []
    monkeypatch.undo()
    age(record.uri(str(output)), 7200)
    assert recover(str(output)) == [record.compaction_id]


def test_a_process_of_another_container_is_not_looked_for_here(output, monkeypatch):
    record = compaction.begin(str(output))._replace(pid=2**22 + 1, process_space="pid:[1]")
    record.write(str(output))
    assert recover(str(output)) == []
    record._replace(process_space="").write(str(output))  # as format 1 did
    assert recover(str(output)) == [record.compaction_id]


def test_one_that_was_undone_notices_it_in_its_heartbeat(output):
    record = running(output)
    recover(str(output))
    with Heartbeat(str(output), record, every_s=0.01) as heartbeat:
        assert heartbeat.lost.wait(10)
    assert not Path(record.uri_beside(str(output), "alive")).exists()


def test_another_s_undo_that_is_under_way_is_waited_for(output, monkeypatch):
    record = lost_by_hand(output, monkeypatch)
    record._replace(process_space="pid:[1]").write(str(output))
    age(record.uri(str(output)), 7200)
    marker = Path(record.uri_beside(str(output), "undone"))
    marker.write_bytes(b"")
    assert recover(str(output)) == []
    age(marker, 7200)
    assert recover(str(output)) == [record.compaction_id]
    assert view(output)


def test_names_of_replaced_files_are_kept_for_a_day(output):
    compact(str(output))
    (done,) = done_compactions(str(output))
    replaced = {name for name in done.replaced if name.startswith("captions/")}
    assert len(replaced) == 3
    done._replace(updated_at=time.time() - 90_000).write(str(output))
    old = output / "_compactions" / "20260101T000000Z-ffffff.undone"
    old.write_bytes(b"")
    age(old, 8 * 86_400)
    write_run(output, THIRD, [0], version="3", later_s=120)
    compact(str(output))
    first, second = sorted(done_compactions(str(output)), key=lambda found: len(found.replaced))
    assert (first.compaction_id, len(first.replaced), first.dropped) == (done.compaction_id, 0, done.dropped)
    assert len(second.replaced) >= 4
    assert not old.exists()


def test_a_record_of_format_1_is_read(output):
    values = {"compaction_id": "a-1", "state": "committed", "updated_at": 1.0, "host": "elsewhere", "pid": 1}
    replaced = [f"captions/{path.name}" for path in (output / "captions").glob(f"{SECOND}*")]
    path = output / "_compactions" / "a-1.json"
    storage.write_atomic(str(path), json.dumps(values | {"replaced": replaced, "dropped": {}}).encode())
    (found,) = open_compactions(str(output))
    assert found == Compaction(**values, replaced=dict.fromkeys(replaced), dropped={}, format=1)
    assert len(latest(str(output)).read("captions")) == 4
