"""The batch pipeline on a true Flink cluster, from S3 to S3: the rows of the in-process run, whatever is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from af3pipe.pipelines import batch
from af3pipe.pipelines.audit import audit
from af3pipe.pipelines.job import make_job
from af3pipe.tables.latest import export_latest
from tests import fixtures_audio as make
from tests.integration.flink import children, flink_cluster
from tests.integration.runners import OF_A_RUN, ON_THE_WAY, TABLES, same_rows
from tests.integration.servers import S3, free_port, python_module, serving, store_server, using
from tests.read_tables import read_table
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]
RATE = 16_000
COPIES = 3
"""Of each of the demo's clips, which are 12: the cluster has something to share out."""


def bad_and_long():
    """By name, what is no good, and what is longer than a segment."""
    fine = make.wav(make.sound(9, RATE), RATE)
    return {
        "empty.wav": b"",
        "text.wav": b"Dear diary, today I am a recording.",
        "cut.wav": fine[: len(fine) // 2],
        "mute.mp4": make.mp4_video(None),
        "over.flac": make.flac(np.zeros((65 * 8000, 1), np.float32), 8000),
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An S3 server with an archive and a manifest that asks questions about some of it; all calls are counted."""
    folder = tmp_path_factory.mktemp("store")
    port = free_port()
    with (
        store_server(S3, folder) as server,
        serving(
            python_module("tests.integration.fault_proxy", port, server.port, "--share", 0),
            port,
            log=folder / "proxy.log",
        ),
        using(server.behind(port)) as found,
    ):
        with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
            files = {clip.name: clip.read_bytes() for clip in clips.iterdir()}
        for copy in range(COPIES):
            for name, data in files.items():
                found.fs.pipe_file(f"archive/in/{copy}/{name}", data)
        for name, data in bad_and_long().items():
            found.fs.pipe_file(f"archive/in/{name}", data)
        asked = [
            {"uri": found.url(f"archive/in/0/{name}"), "question": "Is there speech?", "speaker": str(number)}
            for number, name in enumerate(sorted(files))
        ]
        lines = [*map(json.dumps, asked[:3]), "not json"]
        found.fs.pipe_file("archive/asked.jsonl", "\n".join(lines).encode())
        yield found


@pytest.fixture(scope="module")
def cluster(store, tmp_path_factory):
    with flink_cluster(tmp_path_factory.mktemp("flink"), slots=2) as found:
        yield found


def job(store, model, output, **changes):
    return make_job(
        {
            "inputs": [store.url("archive/in"), store.url("archive/asked.jsonl")],
            "output": store.url(f"labels/{output}"),
            "model": str(model),
            "tasks": ["caption", "transcript"],
            "over_length": "split",
            "max_new_tokens": 24,
            "device": "cpu",
        }
        | changes
    )


@pytest.fixture(scope="module")
def in_process(store, model, tmp_path_factory):
    """What a run in this process writes, as a local copy."""
    assert batch.run(job(store, model, "in_process")).counts.reconciled
    return copied(store, "in_process", tmp_path_factory.mktemp("in_process"))


def copied(store, output, folder):
    store.fs.get(f"labels/{output}/", f"{folder}/", recursive=True)
    return folder


def test_both_task_managers_give_the_rows_of_the_in_process_run(store, cluster, model, in_process, tmp_path):
    report = batch.run(job(store, model, "flink"), cluster.flags)
    assert report.counts.reconciled, report.counts.problems
    assert report.counts.found == 12 * COPIES + len(bad_and_long()) + 1  # the manifest's second line
    assert report.counts.dead_letters["unsupported_format"] >= 2
    same_rows(in_process, copied(store, "flink", tmp_path))
    assert report.metrics["new_tokens"] > 0

    (found,) = cluster.jobs()
    assert found["state"] == "FINISHED"
    asking = [
        sum(number for step, number in read.items() if "AnswerRecordings" in step)
        for read in cluster.records_read(found["jid"]).values()
    ]
    assert len(asking) == 2
    assert all(asking), asking


def recordings_read(store):
    """How often each recording was asked for, since the server started."""
    with urllib.request.urlopen(f"http://127.0.0.1:{store.port}/_faults") as answer:
        calls = json.load(answer)["calls"]
    return Counter({call: number for call, number in calls.items() if call.startswith("GET /archive/in/")})


@contextlib.contextmanager
def midway(store, cluster, job):
    """Starts a run; yields the future of its report when it has read some of its recordings, and not all."""
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(batch.run, job, cluster.flags)
        wait_for_reading(store, report)
        yield report


def wait_for_reading(store, report):
    """Until a fourth of the recordings have been read, counted from now."""
    before = recordings_read(store)

    def read():
        return sum(number > before[call] for call, number in recordings_read(store).items())

    wait_until(lambda: report.done() or read() >= 10, "recordings to be read", 240)
    assert not report.done(), report.result()
    assert read() < 12 * COPIES


def model_process(pool):
    """The one process of a pool, whose model the slots of a TaskManager share."""
    (found,) = running_children(pool)
    return found


def running_children(pool):
    return [pid for pid in children(pool.pid) if is_running(pid)]


def is_running(pid):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def nothing_lost_or_twice(store, output, in_process, tmp_path):
    """Checks that the latest results in an output are those of a run in process."""
    url = store.url(f"labels/{output}")
    assert audit(url).problems == []
    export_latest(url, str(tmp_path / "export"), TABLES)
    for table in TABLES:
        (tmp_path / table).mkdir()
        (tmp_path / "export" / f"{table}.parquet").rename(tmp_path / table / "latest.parquet")
    same_rows(in_process, tmp_path, without=(*OF_A_RUN, *ON_THE_WAY))


def slowly(store, model, output):
    """A job that reads no further ahead than it has to, and writes what it has."""
    return job(store, model, output, slots=1, queue_audio_s=5, decode_threads=1, chunk_recordings=1)


def written(store, output):
    """The recordings that have a row, as calls that read them."""
    files = store.fs.glob(f"labels/{output}/recordings/*.parquet")
    uris = [uri for file in files for uri in read_table(f"s3://{file}", ["uri"])["uri"].to_pylist()]
    return {f"GET /{uri.partition('://')[2]}" for uri in uris}


@contextlib.contextmanager
def those_written_are_not_read_again(store, output):
    done, before = written(store, output), recordings_read(store)
    assert done & before.keys(), "else nothing is shown"
    yield
    again = recordings_read(store) - before
    assert again, "the others have to be read"
    assert not done & again.keys()


def test_a_killed_model_process_and_a_killed_task_manager_cost_time_only(store, cluster, model, in_process, tmp_path):
    with midway(store, cluster, slowly(store, model, "killed")) as report:
        wait_until(lambda: written(store, "killed") & recordings_read(store).keys(), "the first answers to land")
        with those_written_are_not_read_again(store, "killed"):
            os.kill(model_process(cluster.pools[0]), signal.SIGKILL)
            wait_for_reading(store, report)  # by the one that came for it, too
            orphans = running_children(cluster.pools[1])  # none, where it has done its part
            cluster.task_managers[1].kill()
            # It holds a GPU: without its TaskManager it must not stay.
            wait_until(lambda: not any(map(is_running, orphans)), "the worker of the killed TaskManager to end")
            cluster.task_managers[1].start()
            counts = report.result().counts
    assert counts.reconciled, counts.problems
    nothing_lost_or_twice(store, "killed", in_process, tmp_path)


def test_a_run_that_is_interrupted_ends_at_the_cluster_and_keeps_what_it_has_answered(
    store, cluster, model, in_process, tmp_path
):
    again = slowly(store, model, "interrupted")
    (tmp_path / "job.yaml").write_text(again.model_dump_json(exclude_unset=True))
    run = [sys.executable, "-m", "af3pipe", "run", str(tmp_path / "job.yaml"), *cluster.flags]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: len(written(store, "interrupted")) > 8 or process.poll() is not None, "rows", 240)
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143, told
    assert "Traceback" not in told
    wait_until(lambda: cluster.jobs()[0]["state"] == "CANCELED", "the job to be cancelled at the cluster")
    done = written(store, "interrupted")
    with those_written_are_not_read_again(store, "interrupted"):
        counts = batch.run(again, cluster.flags).counts
    assert counts.reconciled, counts.problems
    assert counts.states["skipped_done"] >= len(done)
    nothing_lost_or_twice(store, "interrupted", in_process, tmp_path)


def test_without_its_job_server_a_run_fails_and_the_same_again_completes_it(
    store, cluster, model, in_process, tmp_path, capfd
):
    again = slowly(store, model, "job_server")
    with midway(store, cluster, again) as report:
        cluster.job_server.kill()
        with pytest.raises(batch.RunFailed, match=r"connection to the job server was lost .* run the job again"):
            report.result(60)
    assert "Traceback" not in capfd.readouterr().err
    wait_until(lambda: cluster.jobs()[0]["state"] == "FINISHED", "the job to end without its job server", 240)
    cluster.job_server.start()
    counts = batch.run(again, cluster.flags).counts
    assert counts.reconciled, counts.problems
    assert counts.states == {"skipped_done": counts.found}  # the manifest's bad line, too
    assert not counts.answers
    nothing_lost_or_twice(store, "job_server", in_process, tmp_path)
