"""Watched folders on Prism, Beam's streaming runner: each version of a file is asked once, and its rows land."""

import contextlib
import os
import re
import signal
import subprocess
import time
from datetime import datetime, timezone
from importlib import resources

import numpy as np
import pytest
import soundfile

from af3pipe import storage
from af3pipe.pipelines import batch, streaming
from af3pipe.pipelines.audit import audit
from af3pipe.pipelines.job import make_job
from tests.integration.pubsub import prism
from tests.integration.runners import TABLES, rows, same_rows
from tests.integration.servers import S3, python_module, store_server, using
from tests.read_tables import read_table

pytestmark = [
    pytest.mark.integration,
    # Threads of Beam's worker in this process, when the runner is ended.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
RATE = 16_000
WINDOW_S = 300


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with prism(tmp_path_factory.mktemp("prism")) as flags:
        yield flags


def job(inputs, output, model, **others):
    values = {
        "inputs": inputs,
        "output": str(output),
        "model": str(model),
        "tasks": ["caption", "transcript"],
        "over_length": "split",
        "max_new_tokens": 12,
        "device": "cpu",
        "watch": {"every": "1s", "window": WINDOW_S, "pane_every": "1s"},
    }
    return make_job(values | others)


@contextlib.contextmanager
def watching(watched, flags):
    """A watch that has begun; one that nobody stops is cancelled."""
    watch = streaming.Watch(watched, flags)
    try:
        yield watch
    finally:
        if not watch.wait(0):
            watch.cancel()


def stopped(watch, seconds=120):
    watch.stop()
    assert watch.wait(seconds), "it did not end when it was told to stop"
    return watch.report()


def recordings(output):
    """URIs and states of the rows that there are."""
    folder = output / "recordings"
    if not list(folder.rglob("*.parquet")):
        return []
    found = read_table(folder, ["uri", "terminal_state"])
    return list(zip(*found.to_pydict().values(), strict=True))


def wait_for_rows(output, number, watch, seconds=120):
    deadline = time.monotonic() + seconds
    while len(recordings(output)) < number:
        assert time.monotonic() < deadline, f"{number} rows expected, {recordings(output)} after {seconds} s"
        assert not watch.wait(0.2), "it ended by itself"


def tone(path, seconds=1.0, pitch=440.0, mtime=None):
    """Lands by a rename, as a careful writer's files do."""
    part = path.with_suffix(".part")
    times = np.arange(round(seconds * RATE)) / RATE
    soundfile.write(part, 0.4 * np.sin(2 * np.pi * pitch * times), RATE, format="FLAC")
    if mtime is not None:
        os.utime(part, (mtime, mtime))
    part.rename(path)
    return path


@pytest.mark.representative
def test_what_is_there_and_what_lands_is_answered_as_a_run_answers_it(model, runner, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        found = {clip.name: clip.read_bytes() for clip in sorted(clips.iterdir())}
    names = list(found)
    for name in names[:4]:
        (folder / name).write_bytes(found[name])
    with watching(job([str(folder)], tmp_path / "watched", model), runner) as watch:
        wait_for_rows(tmp_path / "watched", 4, watch)
        for name in names[4:]:
            (folder / name).write_bytes(found[name])
        tone(folder / "long.flac", 65.0)
        (folder / "empty.wav").write_bytes(b"")
        wait_for_rows(tmp_path / "watched", len(names) + 2, watch)
        report = stopped(watch)
    assert report.counts.reconciled, report.counts.problems
    assert report.counts.found == len(names) + 2
    assert report.counts.dead_letters == {"decode_error": 1, "empty_file": 1}
    batch.run(job([str(folder)], tmp_path / "ran", model))
    same_rows(tmp_path / "ran", tmp_path / "watched")
    (transcript,) = [row for row in rows(tmp_path / "watched", "transcripts") if row["uri"].endswith("long.flac")]
    assert [(piece["start_s"], piece["end_s"]) for piece in transcript["segments"]] == [(0.0, 60.0), (60.0, 65.0)]


@pytest.mark.slow
def test_changed_renamed_and_half_written_files(model, runner, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    changed = tone(folder / "changed.flac", 1.0)
    renamed = tone(folder / "renamed.flac", 1.0)
    growing = folder / "growing.wav"
    whole = tmp_path / "whole.wav"
    soundfile.write(whole, np.full(3 * RATE, 0.1), RATE, subtype="PCM_16")
    data = whole.read_bytes()
    patient = {"every": "3s", "window": WINDOW_S, "pane_every": "1s"}
    with watching(job([str(folder)], output, model, tasks=["caption"], watch=patient), runner) as watch:
        wait_for_rows(output, 2, watch)
        with growing.open("wb") as file:
            for start in range(
                0, len(data), len(data) // 16
            ):  # for longer than several looks, and grows between them
                file.write(data[start : start + len(data) // 16])
                file.flush()
                time.sleep(0.5)
        tone(changed, 2.0)
        renamed.rename(folder / "elsewhere.flac")
        wait_for_rows(output, 5, watch)
        report = stopped(watch)
    assert report.counts.reconciled, report.counts.problems
    by_name = {}
    for row in rows(output, "captions"):
        by_name.setdefault(row["uri"].rsplit("/", 1)[1], []).append(row["duration_s"])
    assert by_name == {
        "changed.flac": [1.0, 2.0],
        "renamed.flac": [1.0],
        "elsewhere.flac": [1.0],
        "growing.wav": [3.0],
    }
    assert not rows(output, "dead_letters")


@pytest.mark.slow
def test_rows_land_in_windows_of_modification_time_however_late(model, runner, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    now = time.time()
    mtimes = {"epoch": 1.0, "old": now - 40 * 86400, "hour": now - 3600, "now": now, "clock_ahead": now + 7200}
    for name in ("old", "now"):
        tone(folder / f"{name}.flac", 0.5, mtime=mtimes[name])
    watched = job([str(folder)], output, model, tasks=["caption"], partition_by=["date"])
    with watching(watched, runner) as watch:
        wait_for_rows(output, 2, watch)
        for name in ("clock_ahead", "hour", "epoch"):
            tone(folder / f"{name}.flac", 0.5, mtime=mtimes[name])
        wait_for_rows(output, 5, watch)
        tone(folder / "later.flac", 0.7, mtime=mtimes["old"] + 1)  # another pane of a window that has one
        wait_for_rows(output, 6, watch)
        report = stopped(watch)
    assert report.counts.states == {"ok": 6}
    for table in ("captions", "recordings"):
        for path in (output / table).rglob("*.parquet"):
            begin = re.search(r"-(\d{8}T\d{6}Z)-[0-9a-f]+\.parquet$", path.name)[1]
            begin_s = datetime.strptime(begin, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc).timestamp()
            for mtime in read_table(path, ["mtime"])["mtime"].to_pylist():
                assert 0 <= mtime.timestamp() - begin_s < WINDOW_S
            assert path.parent.name == f"date={begin[:4]}-{begin[4:6]}-{begin[6:8]}"


@pytest.mark.slow
def test_a_watch_begun_again_asks_only_what_is_new(model, runner, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    tone(folder / "first.flac")
    (folder / "broken.wav").write_text("no audio")
    batch.run(job([str(folder)], output, model))
    with watching(job([str(folder)], output, model), runner) as watch:
        tone(folder / "second.flac")
        wait_for_rows(output, 3, watch)
        report = stopped(watch)
    assert report.counts.states == {"ok": 1, "skipped_done": 2}
    assert report.metrics["recordings_skipped_done"] == 2
    assert report.metrics["answers"] == 2
    assert not audit(str(output)).problems


@pytest.mark.slow
def test_rows_that_are_deleted_under_a_watch_do_not_reconcile(model, runner, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    with watching(job([str(folder)], output, model, tasks=["caption"]), runner) as watch:
        for number in range(2):
            tone(folder / f"{number}.flac")
            wait_for_rows(output, number + 1, watch)
        next((output / "recordings").rglob("*.parquet")).unlink()
        report = stopped(watch)
    assert not report.counts.reconciled
    assert "2 recordings were processed, but only 1 are skipped or have a row" in report.counts.problems


@pytest.mark.slow
def test_a_store_that_is_far_away_costs_no_rows(model, runner, tmp_path, monkeypatch):
    """Prism halves what takes a moment: a tick that asks whether to stop must not have its half centuries ahead."""
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    stat = storage.stat

    def far_away(uri):
        if uri.endswith(".stop"):
            time.sleep(1.0)
        return stat(uri)

    monkeypatch.setattr(storage, "stat", far_away)
    with watching(job([str(folder)], output, model, tasks=["caption"]), runner) as watch:
        time.sleep(5)
        for number in range(3):
            tone(folder / f"{number}.flac")
            wait_for_rows(output, number + 1, watch, 60)
        assert stopped(watch).counts.found == 3


def wait_for_files(fs, number):
    deadline = time.monotonic() + 60
    while len(fs.glob("labels/out/recordings/*")) < number:
        assert time.monotonic() < deadline, f"{number} files expected"
        time.sleep(0.5)
        fs.invalidate_cache()


@pytest.mark.slow
def test_objects_of_a_store(model, runner, tmp_path):
    with store_server(S3, tmp_path) as store, using(store) as found:
        local = tone(tmp_path / "local.flac")
        found.fs.pipe_file("archive/in/first.flac", local.read_bytes())
        watched = job([found.url("archive/in/*.flac"), found.url("archive/not-yet/")], found.url("labels/out"), model)
        with watching(watched, runner) as watch:
            wait_for_files(found.fs, 1)
            found.fs.pipe_file("archive/not-yet/second.flac", local.read_bytes())
            wait_for_files(found.fs, 2)  # another pane
            report = stopped(watch)
    assert report.counts.states == {"ok": 2}
    assert report.counts.answers == {"captions": 2, "transcripts": 2}


def command(folder, output, model, *others):
    flags = ["--output", output, "--model", model, "--every", "1s", "--pane-every", "1s", "--max-new-tokens", "8"]
    return python_module("af3pipe", "watch", folder, *flags, *others)


@pytest.mark.parametrize(
    ("tell", "how"),
    [
        pytest.param(os.killpg, signal.SIGINT, id="a terminal tells all of a group, Prism, too"),
        pytest.param(os.kill, signal.SIGTERM, id="a supervisor tells the one that it started"),
    ],
)
@pytest.mark.slow
def test_told_to_stop_it_writes_what_it_found(tell, how, model, tmp_path):
    """Rows wait an hour for others to land with: none is there before it is told.

    Prism also writes them where their window ends, at whatever minute that is: theirs ends tomorrow.
    """
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    tomorrow = time.time() + 24 * 3600
    names = [tone(folder / f"{number}.flac", 0.5 + number, mtime=tomorrow).name for number in range(5)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(folder, output, model, "--pane-every", "3600s"),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while "5 / 5 recordings" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        assert recordings(output) == []
        tell(process.pid, how)
        assert process.wait(90) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert sorted(recordings(output)) == [(str(folder / name), "ok") for name in names]
    assert "5 found = 5 ok (reconciles)" in log.read_text()
    assert not audit(str(output)).problems


@pytest.mark.slow
def test_one_that_is_killed_leaves_the_rest_to_the_next(model, runner, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(12):
        tone(folder / f"{number:02}.flac", 0.5 + number / 4)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command(folder, output, model, "--slots", "1"),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while not recordings(output) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(recordings(output))
    again = job([str(folder)], output, model, tasks=["caption"], max_new_tokens=8, over_length="dead-letter")
    report = batch.run(again)
    assert report.counts.reconciled, report.counts.problems
    assert report.counts.found == 12
    states = report.counts.states
    assert states.get("skipped_done", 0) + states.get("ok", 0) == 12
    if before:
        assert states["skipped_done"] > 0
    assert len({row["answer_key"] for row in rows(output, "captions")}) == 12
    assert not audit(str(output)).problems


@pytest.mark.slow
def test_tables_are_the_same_as_ever(model, runner, tmp_path):
    """A watch that found nothing leaves empty tables, as a run does."""
    (tmp_path / "in").mkdir()
    watched = job([str(tmp_path / "in")], tmp_path / "out", model, watch={"every": "1s", "stop_after": "3s"})
    with watching(watched, runner) as watch:
        assert watch.wait(60)
        report = watch.report()
    assert report.counts.found == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_runs", *TABLES} - {"answers"}
