"""What is written as it comes: files of one window or bundle each, and the row of a recording last."""

import re
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import pytest
from af3pipe.transforms.panes import _shard, _WriteAsSettledDoFn
from af3pipe.transforms.settle import RecordingResult, event_time
from apache_beam.coders import registry
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream
from apache_beam.transforms.window import TimestampedValue

from af3pipe import storage
from af3pipe.transforms import WriteSettledRecordings, panes, write
from tests.collected import Collected
from tests.outputs import answer_row, letter_row, recording_row
from tests.read_tables import read_table

RUN = "20260102T030405Z-abcdef"
EARLY, LATE = "1970-01-01T00:00:00+00:00", "2100-02-03T04:05:06+00:00"


def settled(number, mtime="2026-01-02T03:04:05+00:00", *, broken=False):
    """An answered recording, or one with a dead letter beside its answer."""
    answers = (answer_row(number),)
    letters = (letter_row(number),) if broken else ()
    return RecordingResult(recording_row(number, answers, letters)._replace(mtime=mtime), answers, letters)


def written(output, *panes, **how):
    """Lists of rows, each an hour after the one before it, as a stream writes them; gives what it gives.

    What is written long ago in event time comes as late as it can: the watermark is at today's.
    """
    stream = test_stream.TestStream(coder=registry.get_coder(RecordingResult)).advance_watermark_to(int(time.time()))
    for rows in panes:
        stream.add_elements([TimestampedValue(row, event_time(row)) for row in rows])
        stream.advance_processing_time(3600)
    found = Collected()
    options = PipelineOptions(runner="BundleBasedDirectRunner", streaming=True)  # the others have no such stream
    with beam.Pipeline(options=options) as pipeline:
        settled = pipeline | stream.advance_watermark_to_infinity().with_output_types(RecordingResult)
        _ = settled | WriteSettledRecordings(str(output), **({"run_id": RUN} | how)) | found.into("versions")
    return found["versions"]


def files(output, table):
    return sorted(path.relative_to(output / table) for path in (output / table).rglob("*.parquet"))


def ids(output, table):
    return read_table(output / table)["recording_id"].to_pylist()


def expected_ids(rows):
    return sorted(row.result.recording_id for row in rows)


def test_rows_of_one_window_are_in_a_file_that_names_it(tmp_path):
    # The windows are those of five minutes: 03:00 and 03:05.
    rows = [settled(n, f"2026-01-02T03:0{n}:30+00:00", broken=n == 1) for n in range(1, 9)]
    versions = written(tmp_path, rows)
    assert sorted(versions) == sorted((row.result.recording_id, row.result.content_identity) for row in rows)
    for table in ("captions", "recordings"):
        assert sorted(ids(tmp_path, table)) == expected_ids(rows)
        begins = []
        for name in files(tmp_path, table):
            run, _, rest = name.name.partition("-20260102T")
            assert run == RUN
            found = read_table(tmp_path / table / name)
            minutes = {int(row["uri"].rpartition("/")[2].partition(".")[0]) // 5 * 5 for row in found.to_pylist()}
            begins.append(rest.partition("-")[0])
            assert minutes == {int(begins[-1][2:4])}
            assert set(found["run_id"].to_pylist()) == {RUN}
        assert sorted(begins) == ["030000Z", "030500Z"]
    assert ids(tmp_path, "dead_letters") == [rows[0].result.recording_id]
    (name,) = files(tmp_path, "dead_letters")
    assert name.name.startswith(f"{RUN}-20260102T030000Z-")


def test_the_row_of_a_recording_is_there_last(tmp_path, monkeypatch):
    put, write_atomic = [], storage.write_atomic

    def noting(uri, data):
        write_atomic(uri, data)
        put.append(Path(uri).relative_to(tmp_path).parts[0])

    monkeypatch.setattr(storage, "write_atomic", noting)
    written(tmp_path, [settled(n, broken=True) for n in range(3)])
    assert put == ["captions", "dead_letters", "recordings"]


def test_nothing_is_given_where_the_row_of_a_recording_cannot_be_written(tmp_path):
    (tmp_path / "recordings").touch()  # where a folder should be
    with pytest.raises(Exception, match="recordings"):
        written(tmp_path, [settled(1, broken=True)])
    assert len(ids(tmp_path, "captions")) == len(ids(tmp_path, "dead_letters")) == 1


def test_each_pane_makes_files_of_its_own(tmp_path):
    panes = [settled(1)], [settled(2, broken=True), settled(3)], [settled(4)]
    assert len(written(tmp_path, *panes)) == 4
    found = [
        sorted(read_table(tmp_path / "recordings" / name)["recording_id"].to_pylist())
        for name in files(tmp_path, "recordings")
    ]
    assert sorted(found) == sorted(expected_ids(rows) for rows in panes)
    names = {name.name[: len(f"{RUN}-20260102T030000Z-")] for name in files(tmp_path, "recordings")}
    assert names == {f"{RUN}-20260102T030000Z-"}


def test_a_retried_pane_writes_the_same_files_again(tmp_path):
    rows = [settled(n) for n in range(3)]
    written(tmp_path, rows)
    before = [files(tmp_path, table) for table in ("captions", "recordings")]
    written(tmp_path, rows[::-1])
    assert [files(tmp_path, table) for table in ("captions", "recordings")] == before


def test_a_day_is_that_of_the_window(tmp_path):
    rows = [settled(1, EARLY), settled(2, LATE), settled(3), settled(4, "2026-01-02T23:59:59.999000+00:00")]
    written(tmp_path, rows, partition_by=["date", "station", "run"])
    folders = {path.parent.as_posix() for path in files(tmp_path, "recordings")}
    assert folders == {f"date={day}/station=K%20Q/run={RUN}" for day in ("1970-01-01", "2100-02-03", "2026-01-02")}
    assert {path.parent.as_posix() for path in files(tmp_path, "captions")} == folders


@pytest.mark.parametrize("mtime", [EARLY, LATE, "1966-07-08T09:10:11+00:00", "1601-01-01T00:00:00+00:00", None])
def test_a_file_may_have_been_modified_at_any_time(tmp_path, mtime):
    rows = [settled(1, mtime), settled(2)]
    versions = written(tmp_path, rows, window_s=60)
    assert len(versions) == 2
    assert sorted(ids(tmp_path, "recordings")) == expected_ids(rows)
    when = datetime.fromisoformat(mtime or "2026-01-02T03:04:05+00:00")
    when = max(when, datetime(1970, 1, 1, tzinfo=timezone.utc))
    names = {name.name.removeprefix(f"{RUN}-").partition("-")[0] for name in files(tmp_path, "recordings")}
    assert names == {f"{when:%Y%m%dT%H%M}00Z", "20260102T030400Z"}


def test_a_pane_may_be_spread_over_several_files(tmp_path):
    rows = [settled(n) for n in range(40)]
    written(tmp_path, rows, shards=4)
    shards = {_shard(row, 4) for row in rows}
    assert shards == {0, 1, 2, 3}
    for table in ("captions", "recordings"):
        assert len(files(tmp_path, table)) == len(shards)
        assert sorted(ids(tmp_path, table)) == expected_ids(rows)
    # An answer is in the file of its recording's shard: the digests say so, whoever names them.
    for name in files(tmp_path, "captions"):
        found = read_table(tmp_path / "captions" / name)["recording_id"].to_pylist()
        assert len({_shard(row, 4) for row in rows if row.result.recording_id in found}) == 1


def test_two_versions_of_a_recording_are_two_rows(tmp_path):
    old = settled(1)
    new = RecordingResult(
        old.result._replace(etag="new", work_key="other"), (old.answers[0]._replace(answer_key="other"),), ()
    )
    versions = written(tmp_path, [old, new])
    assert sorted(versions) == sorted((row.result.recording_id, row.result.content_identity) for row in (old, new))
    assert len(ids(tmp_path, "recordings")) == len(ids(tmp_path, "captions")) == 2


def strategy(**how):
    """How its windows are laid, as a runner gets it."""
    pipeline = beam.Pipeline()
    stream = test_stream.TestStream(coder=registry.get_coder(RecordingResult)).with_output_types(RecordingResult)
    _ = pipeline | stream | WriteSettledRecordings("out", run_id=RUN, **how)
    parts = pipeline.to_runner_api().components
    (window,) = [one for one in parts.transforms.values() if one.unique_name == "WriteSettledRecordings/Window"]
    (windowed,) = window.outputs.values()
    return parts.windowing_strategies[parts.pcollections[windowed].windowing_strategy_id]


def test_nothing_is_too_late_and_no_runner_overflows():
    """Runners in Go hold the lateness as nanoseconds in 64 bits: with a thousand years Prism dropped all."""
    lateness_ms = strategy().allowed_lateness
    assert lateness_ms * 10**6 < 2**63
    age_ms = datetime.now(timezone.utc).timestamp() * 1000
    assert lateness_ms > age_ms  # a file of 1970, since when there are modification times


@pytest.mark.parametrize(("asked_s", "waits_ms"), [(60.0, 60_000), (0.25, 1_000), (1.5, 2_000)])
def test_a_pane_waits_whole_seconds(asked_s, waits_ms):
    trigger = strategy(pane_every_s=asked_s).trigger.repeat.subtrigger.after_processing_time
    assert [one.delay.delay_millis for one in trigger.timestamp_transforms] == [waits_ms]


def test_what_is_bounded_is_written_in_the_same_files_whenever_it_was_modified(tmp_path):
    rows = [settled(n, mtime, broken=n == 2) for n, mtime in enumerate((EARLY, LATE, None))]
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        given = pipeline | beam.Create(rows, reshuffle=False).with_output_types(RecordingResult)
        write_them = WriteSettledRecordings(str(tmp_path), run_id=RUN, partition_by=["date", "station"])
        _ = given | write_them | found.into("versions")
    assert sorted(found["versions"]) == sorted((row.result.recording_id, row.result.content_identity) for row in rows)
    for table in ("captions", "recordings"):
        (name,) = files(tmp_path, table)
        assert name.parent.as_posix() == "date=2026-01-02/station=K%20Q", "the day is the run's"
        assert re.fullmatch(RUN + r"-[0-9a-f]{16}\.parquet", name.name)
        assert sorted(ids(tmp_path, table)) == expected_ids(rows)
    assert ids(tmp_path, "dead_letters") == [rows[2].result.recording_id]


def batch_writer(output, most_held=1000, every_s=3600.0):
    dofn = _WriteAsSettledDoFn(str(output), RUN, (), {}, most_held=most_held, every_s=every_s)
    dofn.setup()
    dofn.start_bundle()
    return dofn


def test_a_bundle_of_a_batch_is_written_before_it_ends_when_it_is_large(tmp_path):
    dofn = batch_writer(tmp_path, most_held=3)
    rows = [settled(n) for n in range(7)]
    there = []
    for row in rows:
        given = list(dofn.process(row))
        there.append((len(given), len(files(tmp_path, "recordings"))))
    assert there == [(0, 0), (0, 0), (3, 1), (0, 1), (0, 1), (3, 2), (0, 2)]
    (last,) = dofn.finish_bundle()
    assert last.value[0] == rows[6].result.recording_id
    assert sorted(ids(tmp_path, "recordings")) == expected_ids(rows)
    assert list(dofn.finish_bundle()) == []


def test_a_bundle_of_a_batch_is_written_before_it_ends_when_it_takes_long(tmp_path, monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr(panes, "time", SimpleNamespace(monotonic=lambda: now_s))
    dofn = batch_writer(tmp_path, every_s=600.0)
    assert list(dofn.process(settled(1))) == []
    now_s += 601.0
    assert len(list(dofn.process(settled(2)))) == 2
    assert list(dofn.process(settled(3))) == [], "the wait begins with the first that is held"


def test_a_bundle_of_a_batch_that_comes_again_does_not_write_what_it_held_before(tmp_path):
    dofn = batch_writer(tmp_path)
    assert list(dofn.process(settled(1))) == []
    dofn.start_bundle()
    assert list(dofn.process(settled(2))) == []
    assert len(list(dofn.finish_bundle())) == 1
    assert ids(tmp_path, "recordings") == expected_ids([settled(2)])


def test_windows_may_be_of_part_of_a_second(tmp_path):
    rows = [settled(n, f"2026-01-02T03:04:05.{n}00000+00:00") for n in (1, 6)]
    written(tmp_path, rows, window_s=0.5, pane_every_s=0.5)
    assert len(files(tmp_path, "recordings")) == 2
    assert sorted(ids(tmp_path, "recordings")) == expected_ids(rows)


def test_what_cannot_be_partitions_is_found_while_the_graph_is_built():
    with pytest.raises(ValueError, match="partition_by names 'uri'"):
        WriteSettledRecordings("out", partition_by=["uri"])
    with pytest.raises(ValueError, match="begins with none"):
        WriteSettledRecordings("out", partition_by=["date"], run_id="mine")


def test_rows_are_whole_behind_a_shuffle():
    coder = registry.get_coder(RecordingResult)
    row = settled(1, broken=True)
    again = coder.decode(coder.encode(row))
    assert again == row
    assert type(again.result) is type(row.result)
    assert [type(one) for one in (*again.answers, *again.dead_letters)] == [write.Answer, write.DeadLetter]
