"""What a run has written is not asked again where its runner begins anew; all else is."""

import json
from pathlib import Path

import apache_beam as beam
import pytest

from af3pipe.models import ENGINES, EngineFailed
from af3pipe.pipelines.graph import build
from af3pipe.pipelines.handover import take_found
from af3pipe.pipelines.job import make_job
from af3pipe.schemas import AudioObject, Reason, Recording, Rejected, Stage
from af3pipe.tables.reconcile import count_run
from af3pipe.tables.write import RECORDINGS, write_folders
from af3pipe.transforms.outcome import to_dead_letter
from af3pipe.transforms.written import NotWritten, ReadWritten, _NotWrittenDoFn
from tests import fixtures_audio as make
from tests.collected import Collected
from tests.echo_engine import EchoEngine
from tests.integration.runners import rows
from tests.outputs import FIRST, SECOND, recording_row

RUN = "20260103T030405Z-cccccc"


def planned(*numbers):
    return [AudioObject(recording(n).uri, (recording(n),)) for n in numbers]


def recording(number):
    return Recording(recording_row(number).recording_id, f"s3://archive/{number}.flac", 100)


def letter_of(number):
    return to_dead_letter(Rejected(Stage.LIST, Reason.NOT_FOUND, "gone"), recording(number), stage=Stage.LIST)


def write(output, run_id, *numbers, partition_by=()):
    return list(write_folders(map(recording_row, numbers), RECORDINGS, str(output), run_id, partition_by))


def left_of(dofn, elements):
    dofn.start_bundle()
    return [found for element in elements for found in dofn.process(element)]


def opened(output, run_id):
    dofn = _NotWrittenDoFn(str(output), run_id, (), {})
    dofn.setup()
    return dofn


def test_what_the_run_has_written_goes_no_further(tmp_path):
    """Of partitions that follow from the run's id only its own are listed; of others all."""
    write(tmp_path, RUN, 1, 2, partition_by=["date", "station"])
    write(tmp_path, RUN, 3, partition_by=["date", "station"])
    write(tmp_path, FIRST, 4)
    write(tmp_path, SECOND, 5)
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        given = pipeline | beam.Create(planned(*range(7)), reshuffle=False).with_output_types(AudioObject)
        _ = given | NotWritten(str(tmp_path), RUN, partition_by=["date", "station"]) | found.into("left")
    assert sorted(found["left"]) == sorted(planned(0, 4, 5, 6))


def test_of_an_object_the_recordings_that_are_written_are_left_out(tmp_path):
    run_id = "20260106T030405Z-ffffff"
    write(tmp_path, run_id, 1, 3)
    new = letter_of(4)
    mixed = AudioObject("a", (recording(1), recording(2)), (letter_of(3), new, letter_of(1)))
    (left,) = left_of(opened(tmp_path, run_id), [mixed])
    assert left == AudioObject("a", (recording(2),), (new,))
    done = AudioObject("a", (recording(1),), (letter_of(3),))
    assert left_of(opened(tmp_path, run_id), [done]) == []


def test_all_ids_that_the_run_has_written_can_be_read(tmp_path):
    run_id = "20260107T030405Z-abcdef"
    write(tmp_path, run_id, 1, 2)
    write(tmp_path, FIRST, 3)
    found = Collected()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | ReadWritten(str(tmp_path), run_id) | found.into("ids")
    assert sorted(found["ids"]) == sorted(recording(n).recording_id for n in (1, 2))


def test_a_bundle_that_comes_again_leaves_out_what_was_written_meanwhile(tmp_path):
    dofn, elements = opened(tmp_path, "20260104T030405Z-dddddd"), planned(1, 2, 3)
    assert left_of(dofn, elements) == elements
    write(tmp_path, "20260104T030405Z-dddddd", 2)
    assert left_of(dofn, elements) == planned(1, 3)
    write(tmp_path, "20260104T030405Z-dddddd", 1)
    assert left_of(dofn, elements) == planned(3)


def test_files_are_read_once_in_a_process(tmp_path, monkeypatch):
    run_id = "20260105T030405Z-eeeeee"
    (uri,) = write(tmp_path, run_id, 1)
    assert left_of(opened(tmp_path, run_id), planned(1, 2)) == planned(2)
    (tmp_path / uri.removeprefix(f"{tmp_path}/")).write_bytes(b"not to be read again")
    assert left_of(opened(tmp_path, run_id), planned(1, 2)) == planned(2)


class DyingEngine(EchoEngine):
    """Answers so many requests, and then none."""

    left = 0

    def submit(self, request):
        if type(self).left == 0:
            raise EngineFailed("the GPU is gone")
        type(self).left -= 1
        return super().submit(request)


@pytest.fixture
def dying(monkeypatch):
    monkeypatch.setitem(ENGINES, "dying", "tests.transforms.test_written:DyingEngine")
    return DyingEngine


@pytest.fixture
def archive(tmp_path):
    """A folder of 12 recordings and 2 that are none, and the manifest beside it that names them."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n}.wav").write_bytes(make.wav(make.sound(1 + n / 10, 8000), 8000))
    (folder / "broken.wav").write_bytes(b"fLaC" + bytes(2000))
    (folder / "text.wav").write_bytes(b"Dear diary")
    lines = [json.dumps({"uri": str(path)}) for path in sorted(folder.iterdir())]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    return folder


def answered(output):
    """Names of the files whose answers are there."""
    return sorted(Path(row["uri"]).name for row in rows(output, "recordings") if row["terminal_state"] == "ok")


@pytest.mark.parametrize(
    ("source", "resume"),
    [
        pytest.param("folder", True, id="folder"),
        pytest.param("manifest", False, id="manifest, no resume"),
        pytest.param("manifest", True, id="manifest", marks=pytest.mark.slow),
        pytest.param("folder", False, id="folder, no resume", marks=pytest.mark.slow),
    ],
)
def test_a_job_that_its_runner_begins_again_asks_what_it_has_not_written(tmp_path, archive, dying, source, resume):
    output = tmp_path / "out"
    values = {"output": str(output), "model": "demo", "tasks": ["caption", "transcript"], "engine": "dying"}
    values |= {"inputs": [str(archive if source == "folder" else tmp_path / "list.jsonl")], "resume": resume}
    job = make_job(values | {"chunk_recordings": 1, "slots": 1, "queue_audio_s": 1, "decode_guard": False})

    def begin():
        with beam.Pipeline(runner="FnApiRunner") as pipeline:
            build(pipeline, job, RUN)

    dying.left = 7
    with pytest.raises(Exception, match="the GPU is gone"):
        begin()
    files, before = sorted(output.rglob("*.parquet")), answered(output)
    assert 1 <= len(before) <= 7
    assert (archive / before[0]).unlink() is None, "one that is answered may be gone when all is looked at again"
    dying.left = 12 - len(before)  # it fails where one is asked again
    begin()
    assert dying.left == 0
    counts = count_run(str(output), RUN, *take_found(str(output), RUN))
    assert counts.reconciled, counts.problems
    assert counts.states == {"ok": 12, "dead_letter": 2}
    assert counts.answers == {"captions": 12, "transcripts": 12}
    assert len(rows(output, "recordings")) == 14, "each is there once"
    assert set(files) <= set(output.rglob("*.parquet"))
