"""The same job gives the same rows on every runner: in process, in several processes, and by job service."""

import shutil
from importlib import resources

import numpy as np
import pytest
import soundfile

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from tests.integration.runners import rows, same_rows

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The demo's clips, a folder deeper, with a manifest that asks one of them a question of its own."""
    folder = tmp_path_factory.mktemp("archive")
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        shutil.copytree(clips, folder / "deep" / "clips", ignore=lambda _, names: sorted(names)[6:])
    soundfile.write(folder / "over.flac", np.zeros(65 * 8000, np.int16), 8000)
    (folder / "broken.wav").write_text("no audio at all")
    first = sorted((folder / "deep" / "clips").glob("*.flac"))[0]
    manifest = folder / "asked.jsonl"
    manifest.write_text(f'{{"uri": "{first}", "question": "Is there speech?", "speaker": "7"}}\nnot json\n')
    return folder, manifest


def job(archive, model, output, **changes):
    folder, manifest = archive
    values = {
        "inputs": [str(folder), str(manifest)],
        "output": str(output),
        "model": str(model),
        "tasks": ["caption", "transcript"],
        "over_length": "split",
        "max_new_tokens": 8,
        "device": "cpu",
    }
    return make_job(values | changes)


@pytest.fixture(scope="module")
def in_process(archive, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("in_process")
    report = batch.run(job(archive, model, output, decode_guard=False))
    return output, report


def test_in_process_run_reconciles(in_process):
    _, report = in_process
    counts = report.counts
    assert counts.reconciled, counts.problems
    assert counts.found == sum(counts.states.values()) == 9
    assert counts.dead_letters["unsupported_format"] == 2  # broken.wav and the manifest's second row
    assert report.metrics["recordings_found"] == counts.found
    assert report.metrics["new_tokens"] > 0
    assert report.metrics["encode_ms"] > 0


def test_a_question_of_the_manifest_is_asked_once_and_its_columns_ride_along(in_process):
    output, _ = in_process
    (found,) = rows(output, "answers")
    assert found["question"] == "Is there speech?"
    assert found["metadata"] == '{"speaker": "7"}'


def test_a_long_recording_gives_one_stitched_transcript(in_process):
    output, _ = in_process
    (found,) = [row for row in rows(output, "transcripts") if row["uri"].endswith("over.flac")]
    assert [(piece["start_s"], piece["end_s"]) for piece in found["segments"]] == [(0.0, 60.0), (60.0, 65.0)]
    assert (found["start_s"], found["end_s"], found["duration_s"]) == (0.0, 65.0, 65.0)
    captions = [row for row in rows(output, "captions") if row["uri"].endswith("over.flac")]
    assert len(captions) == 2


@pytest.mark.slow
def test_several_processes_give_the_same_rows_and_verify_a_sample(archive, model, in_process, tmp_path):
    flags = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    report = batch.run(job(archive, model, tmp_path, verify_sample=3), flags)
    assert report.counts.reconciled, report.counts.problems
    assert report.verified[:2] == (3, 3)
    assert report.verified.equal == report.verified.replies
    same_rows(in_process[0], tmp_path)


@pytest.mark.representative
def test_job_service_with_external_workers_gives_the_same_rows(archive, model, in_process, job_service, tmp_path):
    report = batch.run(job(archive, model, tmp_path), job_service)
    assert report.counts.reconciled, report.counts.problems
    same_rows(in_process[0], tmp_path)
