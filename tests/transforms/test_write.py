"""WriteRows and WriteResults: files of one window or bundle each, a recording's row last, and the run's record."""

import json
import re
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import pytest
from apache_beam.coders import registry
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream
from apache_beam.transforms.window import TimestampedValue

from af3pipe import storage
from af3pipe.models import ENGINES, caption, transcript
from af3pipe.schemas import Answer, DeadLetter, RecordingResult, RecordingRow
from af3pipe.tables.reconcile import count_run
from af3pipe.transforms import (
    AnswerRecordings,
    Answers,
    AskAudioFlamingo,
    DeadLetters,
    DecodeAudio,
    ReadRecordings,
    Rows,
    WriteResults,
    write,
)
from af3pipe.transforms.answer import event_time
from af3pipe.transforms.write import WriteRows, _shard, _WriteBufferedDoFn
from benchmarks import constant_engine
from tests import fixtures_audio as make
from tests.collected import Collected
from tests.outputs import result
from tests.read_tables import read_table

RUN = "20260102T030405Z-abcdef"
EARLY, LATE = "1970-01-01T00:00:00+00:00", "2100-02-03T04:05:06+00:00"


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
        results = pipeline | stream.advance_watermark_to_infinity().with_output_types(RecordingResult)
        _ = results | WriteRows(str(output), **({"run_id": RUN} | how)) | found.into("versions")
    return found["versions"]


def files(output, table):
    return sorted(path.relative_to(output / table) for path in (output / table).rglob("*.parquet"))


def ids(output, table):
    return read_table(output / table)["recording_id"].to_pylist()


def expected_ids(rows):
    return sorted(row.row.recording_id for row in rows)


def test_rows_of_one_window_are_in_a_file_that_names_it(tmp_path):
    # The windows are those of five minutes: 03:00 and 03:05.
    rows = [result(n, f"2026-01-02T03:0{n}:30+00:00", broken=n == 1) for n in range(1, 9)]
    versions = written(tmp_path, rows)
    assert sorted(versions) == sorted((row.row.recording_id, row.row.content_identity) for row in rows)
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
    assert ids(tmp_path, "dead_letters") == [rows[0].row.recording_id]
    (name,) = files(tmp_path, "dead_letters")
    assert name.name.startswith(f"{RUN}-20260102T030000Z-")


def test_the_row_of_a_recording_is_there_last(tmp_path, monkeypatch):
    put, write_atomic = [], storage.write_atomic

    def noting(uri, data):
        write_atomic(uri, data)
        put.append(Path(uri).relative_to(tmp_path).parts[0])

    monkeypatch.setattr(storage, "write_atomic", noting)
    written(tmp_path, [result(n, broken=True) for n in range(3)])
    assert put == ["captions", "dead_letters", "recordings"]


def test_nothing_is_given_where_the_row_of_a_recording_cannot_be_written(tmp_path):
    (tmp_path / "recordings").touch()  # where a folder should be
    with pytest.raises(Exception, match="recordings"):
        written(tmp_path, [result(1, broken=True)])
    assert len(ids(tmp_path, "captions")) == len(ids(tmp_path, "dead_letters")) == 1


def test_each_pane_makes_files_of_its_own(tmp_path):
    panes = [result(1)], [result(2, broken=True), result(3)], [result(4)]
    assert len(written(tmp_path, *panes)) == 4
    found = [
        sorted(read_table(tmp_path / "recordings" / name)["recording_id"].to_pylist())
        for name in files(tmp_path, "recordings")
    ]
    assert sorted(found) == sorted(expected_ids(rows) for rows in panes)
    names = {name.name[: len(f"{RUN}-20260102T030000Z-")] for name in files(tmp_path, "recordings")}
    assert names == {f"{RUN}-20260102T030000Z-"}


def test_a_retried_pane_writes_the_same_files_again(tmp_path):
    rows = [result(n) for n in range(3)]
    written(tmp_path, rows)
    before = [files(tmp_path, table) for table in ("captions", "recordings")]
    written(tmp_path, rows[::-1])
    assert [files(tmp_path, table) for table in ("captions", "recordings")] == before


def test_a_day_is_that_of_the_window(tmp_path):
    rows = [result(1, EARLY), result(2, LATE), result(3), result(4, "2026-01-02T23:59:59.999000+00:00")]
    written(tmp_path, rows, partition_by=["date", "station", "run"])
    folders = {path.parent.as_posix() for path in files(tmp_path, "recordings")}
    assert folders == {f"date={day}/station=K%20Q/run={RUN}" for day in ("1970-01-01", "2100-02-03", "2026-01-02")}
    assert {path.parent.as_posix() for path in files(tmp_path, "captions")} == folders


@pytest.mark.parametrize("mtime", [EARLY, LATE, "1966-07-08T09:10:11+00:00", "1601-01-01T00:00:00+00:00", None])
def test_a_file_may_have_been_modified_at_any_time(tmp_path, mtime):
    rows = [result(1, mtime), result(2)]
    versions = written(tmp_path, rows, window_s=60)
    assert len(versions) == 2
    assert sorted(ids(tmp_path, "recordings")) == expected_ids(rows)
    when = datetime.fromisoformat(mtime or "2026-01-02T03:04:05+00:00")
    when = max(when, datetime(1970, 1, 1, tzinfo=timezone.utc))
    names = {name.name.removeprefix(f"{RUN}-").partition("-")[0] for name in files(tmp_path, "recordings")}
    assert names == {f"{when:%Y%m%dT%H%M}00Z", "20260102T030400Z"}


def test_a_pane_may_be_spread_over_several_files(tmp_path):
    rows = [result(n) for n in range(40)]
    written(tmp_path, rows, shards=4)
    shards = {_shard(row, 4) for row in rows}
    assert shards == {0, 1, 2, 3}
    for table in ("captions", "recordings"):
        assert len(files(tmp_path, table)) == len(shards)
        assert sorted(ids(tmp_path, table)) == expected_ids(rows)
    # An answer is in the file of its recording's shard: the digests say so, whoever names them.
    for name in files(tmp_path, "captions"):
        found = read_table(tmp_path / "captions" / name)["recording_id"].to_pylist()
        assert len({_shard(row, 4) for row in rows if row.row.recording_id in found}) == 1


def test_two_versions_of_a_recording_are_two_rows(tmp_path):
    old = result(1)
    new = RecordingResult(
        old.row._replace(etag="new", work_key="other"), (old.answers[0]._replace(answer_key="other"),), ()
    )
    versions = written(tmp_path, [old, new])
    assert sorted(versions) == sorted((row.row.recording_id, row.row.content_identity) for row in (old, new))
    assert len(ids(tmp_path, "recordings")) == len(ids(tmp_path, "captions")) == 2


def strategy(**how):
    """How its windows are laid, as a runner gets it."""
    pipeline = beam.Pipeline()
    stream = test_stream.TestStream(coder=registry.get_coder(RecordingResult)).with_output_types(RecordingResult)
    _ = pipeline | stream | WriteRows("out", run_id=RUN, **how)
    parts = pipeline.to_runner_api().components
    (window,) = [one for one in parts.transforms.values() if one.unique_name == "WriteRows/Window"]
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
    rows = [result(n, mtime, broken=n == 2) for n, mtime in enumerate((EARLY, LATE, None))]
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        given = pipeline | beam.Create(rows, reshuffle=False).with_output_types(RecordingResult)
        write_them = WriteRows(str(tmp_path), run_id=RUN, partition_by=["date", "station"])
        _ = given | write_them | found.into("versions")
    assert sorted(found["versions"]) == sorted((row.row.recording_id, row.row.content_identity) for row in rows)
    for table in ("captions", "recordings"):
        (name,) = files(tmp_path, table)
        assert name.parent.as_posix() == "date=2026-01-02/station=K%20Q", "the day is the run's"
        assert re.fullmatch(RUN + r"-[0-9a-f]{16}\.parquet", name.name)
        assert sorted(ids(tmp_path, table)) == expected_ids(rows)
    assert ids(tmp_path, "dead_letters") == [rows[2].row.recording_id]


def batch_writer(output, max_buffered=1000, every_s=3600.0):
    dofn = _WriteBufferedDoFn(str(output), RUN, (), {}, max_buffered=max_buffered, every_s=every_s)
    dofn.setup()
    dofn.start_bundle()
    return dofn


def test_a_bundle_of_a_batch_is_written_before_it_ends_when_it_is_large(tmp_path):
    dofn = batch_writer(tmp_path, max_buffered=3)
    rows = [result(n) for n in range(7)]
    there = []
    for row in rows:
        given = list(dofn.process(row))
        there.append((len(given), len(files(tmp_path, "recordings"))))
    assert there == [(0, 0), (0, 0), (3, 1), (0, 1), (0, 1), (3, 2), (0, 2)]
    (last,) = dofn.finish_bundle()
    assert last.value[0] == rows[6].row.recording_id
    assert sorted(ids(tmp_path, "recordings")) == expected_ids(rows)
    assert list(dofn.finish_bundle()) == []


def test_a_bundle_of_a_batch_is_written_before_it_ends_when_it_takes_long(tmp_path, monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr(write, "time", SimpleNamespace(monotonic=lambda: now_s))
    dofn = batch_writer(tmp_path, every_s=600.0)
    assert list(dofn.process(result(1))) == []
    now_s += 601.0
    assert len(list(dofn.process(result(2)))) == 2
    assert list(dofn.process(result(3))) == [], "the wait begins with the first that is held"


def test_a_bundle_of_a_batch_that_comes_again_does_not_write_what_it_held_before(tmp_path):
    dofn = batch_writer(tmp_path)
    assert list(dofn.process(result(1))) == []
    dofn.start_bundle()
    assert list(dofn.process(result(2))) == []
    assert len(list(dofn.finish_bundle())) == 1
    assert ids(tmp_path, "recordings") == expected_ids([result(2)])


def test_windows_may_be_of_part_of_a_second(tmp_path):
    rows = [result(n, f"2026-01-02T03:04:05.{n}00000+00:00") for n in (1, 6)]
    written(tmp_path, rows, window_s=0.5, pane_every_s=0.5)
    assert len(files(tmp_path, "recordings")) == 2
    assert sorted(ids(tmp_path, "recordings")) == expected_ids(rows)


def test_what_cannot_be_partitions_is_found_while_the_graph_is_built():
    with pytest.raises(ValueError, match="partition_by names 'uri'"):
        WriteRows("out", run_id=RUN, partition_by=["uri"])
    with pytest.raises(ValueError, match="begins with none"):
        WriteRows("out", partition_by=["date"], run_id="mine")
    with pytest.raises(ValueError, match=r"run_id is '\.\./escaped'"):
        WriteResults("out", run_id="../escaped")


def test_rows_are_whole_behind_a_shuffle():
    coder = registry.get_coder(RecordingResult)
    row = result(1, broken=True)
    again = coder.decode(coder.encode(row))
    assert again == row
    assert type(again.row) is type(row.row)
    assert [type(one) for one in (*again.answers, *again.dead_letters)] == [Answer, DeadLetter]


# --- a whole output


@pytest.fixture
def echo_engine(monkeypatch):
    monkeypatch.setitem(ENGINES, "echo", "tests.echo_engine:EchoEngine")
    monkeypatch.setattr(constant_engine, "window_s", 0.0)


@pytest.fixture
def archive(tmp_path):
    """Three recordings, and two of which nothing can be answered."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.wav").write_bytes(make.wav(make.sound(1 + n / 10, 8000), 8000))
    (folder / "broken.flac").write_bytes(b"fLaC" + bytes(2000))
    (folder / "empty.wav").write_bytes(b"")
    return folder


def write_all(inputs, output, **how):
    found = Collected()
    decode = DecodeAudio(model="demo", guard=None)
    ask = AskAudioFlamingo(model="demo", engine="echo", tasks=[caption(), transcript()])
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        results = pipeline | ReadRecordings(inputs) | AnswerRecordings(decode=decode, ask=ask)
        writing = WriteResults(str(output), **how)
        _ = results | writing | "Records" >> found.into("records")
        for name, rows in (("answers", Answers()), ("letters", DeadLetters()), ("rows", Rows())):
            _ = results | name >> rows | f"Keep_{name}" >> found.into(name)
    return writing.run_id, found


@pytest.mark.parametrize("partition_by", [(), ("date", "run")])
def test_a_pipeline_leaves_a_whole_output_that_reconciles(tmp_path, archive, echo_engine, partition_by):
    output = tmp_path / "out"
    run_id, found = write_all(str(archive), output, partition_by=partition_by)
    (uri,) = found["records"]
    assert uri == str(output / "_runs" / f"{run_id}.json")
    record = json.loads(Path(uri).read_text())
    assert record["run_id"] == run_id
    assert (record["reconciled"], record["problems"], record["recordings_found"]) == (True, [], 5)
    assert record["recordings"] == {"ok": 3, "dead_letter": 2}
    assert record["answers"] == {"captions": 3, "transcripts": 3}
    assert record["dead_letters"] == {"empty_file": 1, "unsupported_format": 1}
    assert record["model"]["id"] == "demo"
    counts = count_run(str(output), run_id, 5)
    assert counts.reconciled
    for table, number in (("captions", 3), ("transcripts", 3), ("dead_letters", 2), ("recordings", 5)):
        rows = read_table(output / table).to_pylist()
        assert len(rows) == number
        assert {row["run_id"] for row in rows} == {run_id}
        folder = f"date={run_id[:4]}-{run_id[4:6]}-{run_id[6:8]}/run={run_id}" if partition_by else "."
        assert {path.parent.as_posix() for path in files(output, table)} == {folder}
    assert len(found["answers"]) == 6
    assert {type(row) for row in found["answers"]} == {Answer}
    assert {type(row) for row in found["letters"]} == {DeadLetter}
    assert {type(row) for row in found["rows"]} == {RecordingRow}
    assert (len(found["letters"]), len(found["rows"])) == (2, 5)


def test_two_pipelines_into_one_output_are_two_runs(tmp_path, archive, echo_engine):
    output = tmp_path / "out"
    first, _ = write_all(str(archive / "0.wav"), output, run_id="night-1")
    second, _ = write_all(str(archive / "*.wav"), output, run_id="night-10")
    assert (first, second) == ("night-1", "night-10")
    assert count_run(str(output), first, 1).reconciled
    assert count_run(str(output), second, 4).reconciled
    assert not count_run(str(output), first, 4).reconciled


def test_a_pipeline_that_found_nothing_leaves_a_record_and_tables(tmp_path):
    (tmp_path / "in").mkdir()
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        nothing = pipeline | beam.Create([], reshuffle=False).with_output_types(RecordingResult)
        _ = nothing | WriteResults(str(tmp_path / "out"), run_id=RUN) | found.into("records")
    record = json.loads(Path(*found["records"]).read_text())
    assert (record["recordings_found"], record["recordings"], record["reconciled"]) == (0, {}, True)
    for table in ("captions", "recordings", "dead_letters"):
        assert read_table(tmp_path / "out" / table).num_rows == 0
    assert count_run(str(tmp_path / "out"), RUN, 0).reconciled


def test_a_stream_gives_the_versions_that_are_written(tmp_path):
    rows = [result(n) for n in range(3)]
    stream = test_stream.TestStream(coder=registry.get_coder(RecordingResult)).advance_watermark_to(int(time.time()))
    stream.add_elements([TimestampedValue(row, event_time(row)) for row in rows])
    stream.advance_processing_time(3600)
    found = Collected()
    options = PipelineOptions(runner="BundleBasedDirectRunner", streaming=True)
    with beam.Pipeline(options=options) as pipeline:
        results = pipeline | stream.advance_watermark_to_infinity().with_output_types(RecordingResult)
        _ = results | WriteResults(str(tmp_path), run_id=RUN) | found.into("versions")
    assert sorted(found["versions"]) == sorted((row.row.recording_id, row.row.content_identity) for row in rows)
    assert sorted(ids(tmp_path, "recordings")) == expected_ids(rows)
    assert not (tmp_path / "_runs").exists(), "a stream has no end that a record could be of"
