"""Objects that are replaced while a run goes on: a row is about the bytes that it names, or it is a dead letter."""

import io
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile

from af3pipe import storage
from af3pipe.models import ENGINES
from af3pipe.pipelines import batch
from af3pipe.pipelines.audit import audit
from af3pipe.pipelines.job import make_job
from benchmarks import constant_engine
from tests.integration.runners import rows
from tests.integration.servers import S3, store_server, using

pytestmark = pytest.mark.integration
RATE = 16_000
FIRST, OLD, NEW = 0.5, 1.0, 1.5  # seconds
NUMBER = 12
FIRST_CHUNK = 3


class ReplacingEngine(constant_engine.ConstantEngine):
    """Replaces objects when it is asked for the first time: after they were listed, before most are read."""

    replace: ClassVar = staticmethod(lambda: None)

    def submit(self, request):
        replace, ReplacingEngine.replace = ReplacingEngine.replace, lambda: None
        replace()
        return super().submit(request)


@pytest.fixture(autouse=True)
def replacing(engines, monkeypatch):
    monkeypatch.setitem(ENGINES, "replacing", f"{__name__}:ReplacingEngine")
    monkeypatch.setattr(ReplacingEngine, "replace", staticmethod(lambda: None))


def sound(seconds, pitch=440.0):
    buffer = io.BytesIO()
    times = np.arange(round(seconds * RATE)) / RATE
    soundfile.write(buffer, 0.4 * np.sin(2 * np.pi * pitch * times), RATE, format="WAV")
    return buffer.getvalue()


def run(inputs, output, model, **changes):
    values = {
        "inputs": inputs,
        "output": output,
        "model": str(model),
        "tasks": ["caption"],
        "engine": "replacing",
        "chunk_recordings": FIRST_CHUNK,  # those behind it are read after the engine was asked
        "device": "cpu",
    }
    return batch.run(make_job(values | changes))


def fill(folder):
    (folder / "0.wav").write_bytes(sound(FIRST))
    for number in range(1, NUMBER):
        (folder / f"{number}.wav").write_bytes(sound(OLD, 400 + number))


def test_rows_name_the_version_that_was_read(model, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    fill(folder)

    def replace():
        for path in folder.iterdir():
            if path.name != "0.wav":
                path.write_bytes(sound(NEW))

    ReplacingEngine.replace = replace
    report = run([str(folder)], str(output), model)
    assert report.counts.states == {"ok": NUMBER}
    assert report.metrics["objects_changed"] >= NUMBER - FIRST_CHUNK, "those may be read before"
    for row in rows(output, "captions", without=()):
        status = Path(row["uri"]).stat()
        is_new = row["duration_s"] == NEW
        assert is_new == (row["size_bytes"] == len(sound(NEW))), "a row of one version has the other's size"
        if is_new:
            assert row["mtime"].timestamp() == pytest.approx(status.st_mtime, abs=1e-5)
    # What is answered is of the version that is there: nothing is read, or asked, again, but for one read before.
    again = run([str(folder)], str(output), model)
    assert again.counts.states.get("skipped_done", 0) >= NUMBER - FIRST_CHUNK
    audited = audit(str(output), [str(folder)])
    assert audited.right, audited.problems


def test_what_changes_all_the_time_is_a_dead_letter_that_the_next_run_tries_again(model, tmp_path, monkeypatch):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "steady.wav").write_bytes(sound(FIRST))
    growing = folder / "growing.wav"
    growing.write_bytes(sound(OLD))
    opened = storage.open_version

    def open_and_append(listed):
        file = opened(listed)
        if listed.uri == str(growing):
            with growing.open("ab") as more:
                more.write(b"\0" * 1000)
        return file

    monkeypatch.setattr(storage, "open_version", open_and_append)
    report = run([str(folder)], str(output), model)
    assert report.counts.states == {"ok": 1, "dead_letter": 1}
    assert report.counts.dead_letters == {"changed": 1}
    (letter,) = rows(output, "dead_letters")
    assert letter["retryable"]
    assert "growing.wav" in letter["detail"]
    monkeypatch.undo()
    monkeypatch.setitem(ENGINES, "replacing", f"{__name__}:ReplacingEngine")
    assert run([str(folder)], str(output), model).counts.states == {"ok": 1, "skipped_done": 1}


def test_all_parts_of_an_object_are_of_one_version(model, tmp_path):
    """A part that was answered before the object changed is answered again, with the others."""
    path, listed, output = tmp_path / "long.wav", tmp_path / "list.jsonl", tmp_path / "out"
    path.write_bytes(sound(3.0))
    listed.write_text("".join(f'{{"path": "long.wav", "offset": {n / 4}, "duration": 0.25}}\n' for n in range(10)))

    def replace():
        time.sleep(0.01)
        path.write_bytes(sound(2.9, 300))

    ReplacingEngine.replace = replace
    report = run([str(listed)], str(output), model, over_length="split")
    found = rows(output, "captions", without=())
    assert report.counts.states == {"ok": 10}
    assert {row["size_bytes"] for row in found} == {path.stat().st_size}


@pytest.mark.slow
def test_objects_of_a_store(model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    fill(folder)
    with store_server(S3, tmp_path) as store, using(store) as found:
        for path in folder.iterdir():
            found.fs.pipe_file(f"archive/in/{path.name}", path.read_bytes())

        def replace():
            for number in range(1, NUMBER):
                found.fs.pipe_file(f"archive/in/{number}.wav", sound(NEW))

        ReplacingEngine.replace = replace
        report = run([found.url("archive/in/")], str(tmp_path / "out"), model)
        urls = [found.url(f"archive/in/{number}.wav") for number in range(NUMBER)]
        etags = {url: storage.stat(url).etag for url in urls}
    assert report.counts.states == {"ok": NUMBER}, [row["detail"] for row in rows(tmp_path / "out", "dead_letters")]
    now = [row for row in rows(tmp_path / "out", "captions") if row["etag"] == etags[row["uri"]]]
    assert len(now) >= NUMBER - FIRST_CHUNK, "those may be read before"
    for row in now:
        assert row["duration_s"] == (FIRST if row["uri"].endswith("/0.wav") else NEW)
