"""Reading what earlier runs wrote: in bulk, while a compaction is at work, and beside a stream."""

import apache_beam as beam
import pytest

from af3pipe import storage
from af3pipe.models import ENGINES, caption
from af3pipe.schemas import AudioObject, DeadLetter, Existing, Reason, Recording, Rejected, Stage
from af3pipe.tables.compact import compact
from af3pipe.tables.existing import ExistingAnswer, ExistingLetter, ExistingRecording, existing_rows
from af3pipe.tables.write import DEAD_LETTER_ROWS, RECORDINGS, write_rows
from af3pipe.transforms import AskAudioFlamingo, DecodeAudio, Outcome, resume
from af3pipe.transforms.inputs.clock import Ticks
from af3pipe.transforms.outcome import to_dead_letter
from af3pipe.transforms.plan import WorkKeys
from af3pipe.transforms.result import make_result, rejected_result
from af3pipe.transforms.resume import PlanStream, ReadExisting
from tests.collected import Collected
from tests.outputs import FIRST, SECOND, write_run

BASE = Recording("id", "s3://b/a.flac", 10, "etag", "2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def closed_engine(monkeypatch):
    monkeypatch.setitem(ENGINES, "closed", "tests.closed_engine:ClosedEngine")


def how():
    return (
        DecodeAudio(model="demo").decoder,
        AskAudioFlamingo(model="demo", engine="closed", tasks=[caption()]).asker,
    )


def keyed(recording):
    decoder, asker = how()
    asker.setup()
    return WorkKeys(decoder, asker).add(recording)


# --- in bulk


def read_by_runner(output, run_id="20990101T000000Z-abcdef"):
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | ReadExisting(str(output), run_id, {}) | found.into("rows")
    return found["rows"]


def test_all_rows_of_other_runs_are_read(tmp_path):
    write_run(tmp_path, FIRST, range(20), broken=[20, 21])
    write_run(tmp_path, SECOND, range(3), version="again", partition_by=["date", "station"])
    rows = read_by_runner(tmp_path)
    kinds = [
        sum(isinstance(row, kind) for row in rows) for kind in (ExistingRecording, ExistingAnswer, ExistingLetter)
    ]
    assert kinds == [25, 23, 2]
    assert sorted(rows, key=repr) == sorted(existing_rows(str(tmp_path)), key=repr)
    others = read_by_runner(tmp_path, SECOND)
    assert len(others) == 44, "what this run has written itself is of no earlier one"
    assert read_by_runner(tmp_path / "none") == []


def test_a_file_that_a_compaction_replaced_meanwhile_is_read_in_its_place(tmp_path, monkeypatch):
    write_run(tmp_path, FIRST, range(20))
    expected = sorted((row.uri, type(row).__name__) for row in existing_rows(str(tmp_path)))
    read = resume.read_existing
    compactions = []

    def compacted_meanwhile(*file):
        if not compactions:
            compactions.append(compact(str(tmp_path)))
        return read(*file)

    monkeypatch.setattr(resume, "read_existing", compacted_meanwhile)
    found = {(row.uri, type(row).__name__) for row in read_by_runner(tmp_path)}
    assert compactions[0].rows
    assert found == set(expected)


def test_a_file_that_cannot_be_read_ends_the_job(tmp_path):
    write_run(tmp_path, FIRST, range(2))
    next((tmp_path / "recordings").glob("*")).write_bytes(b"no Parquet")
    with pytest.raises(Exception, match="with rows of earlier runs, cannot be used"):
        read_by_runner(tmp_path)
    with pytest.raises(storage.StorageError, match="with rows of earlier runs, cannot be used"):
        list(existing_rows(str(tmp_path)))


# --- a stream, one recording at a time


def planned_in_stream(output, *found):
    """What `PlanStream` gives of an unbounded collection: objects by recording, and what is skipped."""
    collected = Collected()
    stop = output / "stop"
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ticks = pipeline | Ticks(3600.0, stop_uri=str(stop))  # already there: no tick, but a stream
        recordings = (
            (ticks | beam.FlatMap(lambda _: []), pipeline | beam.Create([one for one in found if is_recording(one)]))
            | "Recordings" >> beam.Flatten()
            | "Typed" >> beam.Map(lambda one: one).with_output_types(Recording)
        )
        letters = pipeline | "Letters" >> beam.Create([one for one in found if not is_recording(one)])
        assert not recordings.is_bounded
        planned = Outcome(recordings, letters) | PlanStream(str(output), *how(), {})
        for name, items in planned._asdict().items():
            _ = items | name >> collected.into(name)
    return collected["objects"], collected["skipped"]


def is_recording(found):
    return isinstance(found, Recording)


def rejected(name):
    error = Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, "no name")
    return to_dead_letter(error, Recording(name, name), stage=Stage.LIST)


def test_a_stream_is_compared_with_what_there_is_when_it_starts(tmp_path):
    (tmp_path / "stop").touch()
    new = BASE._replace(recording_id="new")
    told, untold, cut_short = map(rejected, ("told", "untold", "cut_short"))
    letter = to_dead_letter(Rejected(Stage.DECODE, Reason.TOO_LONG, "long"), BASE, stage=Stage.DECODE)
    rows = [make_result(keyed(BASE), (), [letter]).row, rejected_result([told]).row]
    list(write_rows(rows, RECORDINGS, str(tmp_path), "recordings", "run-1"))
    # Of the last, the run was killed before it wrote the row that names it.
    list(write_rows([letter, told, cut_short], DEAD_LETTER_ROWS, str(tmp_path), "dead_letters", "run-1"))
    objects, skipped = planned_in_stream(tmp_path, BASE, new, told, untold, cut_short)
    assert sorted(skipped) == [(BASE.recording_id, "etag"), ("told", "None:None")]
    (asked,) = [one for one in objects if one.recordings]
    assert asked == AudioObject(BASE.uri, (keyed(new),))
    letters = [one for found in objects for one in found.dead_letters]
    assert {one.recording_id: one.run_id for one in letters} == {"untold": "", "cut_short": ""}


def test_a_stream_asks_of_another_version_and_knows_what_there_was(tmp_path):
    (tmp_path / "stop").touch()
    letter = to_dead_letter(Rejected(Stage.DECODE, Reason.TOO_LONG, "long"), BASE, stage=Stage.DECODE)
    list(write_rows([letter], DEAD_LETTER_ROWS, str(tmp_path), "dead_letters", "run-1"))
    list(write_rows([make_result(keyed(BASE), (), [letter]).row], RECORDINGS, str(tmp_path), "recordings", "run-1"))
    changed = BASE._replace(etag="another")
    ((asked,), skipped) = planned_in_stream(tmp_path, BASE, changed)
    assert skipped == [(BASE.recording_id, "etag")]
    (recording,) = asked.recordings
    assert recording.etag == "another"
    assert recording.existing == Existing((), ((letter.dead_letter_key, "run-1"),))


def test_an_id_that_an_earlier_run_gave_away_is_a_dead_letter_in_a_stream_too(tmp_path):
    (tmp_path / "stop").touch()
    letter = to_dead_letter(Rejected(Stage.DECODE, Reason.TOO_LONG, "long"), BASE, stage=Stage.DECODE)
    list(write_rows([make_result(keyed(BASE), (), [letter]).row], RECORDINGS, str(tmp_path), "recordings", "run-1"))
    ((found,), _) = planned_in_stream(tmp_path, BASE._replace(uri="s3://b/other.flac"))
    (clash,) = found.dead_letters
    assert isinstance(clash, DeadLetter)
    assert BASE.uri in clash.detail
    assert found.recordings == ()
