"""A watched folder on a true Flink cluster: a killed TaskManager's work is done again, and each row written once."""

import shutil
from importlib import resources

import pytest

from af3pipe.pipelines import batch, streaming
from af3pipe.pipelines.audit import audit
from af3pipe.pipelines.job import make_job
from af3pipe.tables.latest import export_latest
from tests.integration.flink import flink_cluster
from tests.integration.runners import TABLES, same_rows
from tests.read_tables import read_table
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def job(folder, output, model):
    return make_job(
        {
            "inputs": [str(folder)],
            "output": str(output),
            "model": str(model),
            "tasks": ["caption", "transcript"],
            "max_new_tokens": 24,
            "device": "cpu",
            "watch": {"every": "2s", "pane_every": "2s"},
        }
    )


def recordings_in(output):
    """URIs that have a row."""
    files = list((output / "recordings").rglob("*.parquet"))
    return set(read_table(output / "recordings", ["uri"])["uri"].to_pylist()) if files else set()


def checkpoints(cluster):
    return cluster.ask(f"/jobs/{cluster.jobs()[0]['jid']}/checkpoints")["counts"]


def test_a_killed_task_manager_loses_nothing(model, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "watched"
    folder.mkdir()
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as clips:
        found = {clip.name: clip.read_bytes() for clip in sorted(clips.iterdir())}
    names = list(found)
    for name in names[:5]:
        (folder / name).write_bytes(found[name])
    with flink_cluster(tmp_path / "flink") as cluster:
        watch = streaming.Watch(job(folder, output, model), [*cluster.flags, "--checkpointing_interval=1000"])
        try:
            wait_until(lambda: watch.wait(0) or len(recordings_in(output)) == 5, "the first rows", 180)
            for name in names[5:]:
                (folder / name).write_bytes(found[name])
            wait_until(lambda: watch.wait(0) or checkpoints(cluster)["completed"] > 3, "checkpoints", 60)
            cluster.task_managers[1].kill()
            cluster.task_managers[1].start()
            wait_until(lambda: watch.wait(0) or len(recordings_in(output)) == len(names), "all rows", 240)
            watch.stop()
            wait_until(lambda: watch.wait(0), "the end of the stream", 120)
            report = watch.report()
            assert checkpoints(cluster)["restored"] >= 1
            wait_until(lambda: cluster.jobs()[0]["state"] == "CANCELED", "the end of the job at the cluster", 60)
            assert [job["name"] for job in cluster.jobs()] == [f"af3pipe-{watch.run_id.lower()}"]
        finally:
            if not watch.wait(0):
                watch.cancel()
    assert report.counts.reconciled, report.counts.problems
    assert audit(str(output)).problems == []
    assert recordings_in(output) == {str(folder / name) for name in names}

    batch.run(job(folder, tmp_path / "ran", model))
    export_latest(str(output), str(tmp_path / "export"), TABLES)
    for table in TABLES:
        if (tmp_path / "export" / f"{table}.parquet").exists():
            (tmp_path / "latest" / table).mkdir(parents=True)
            shutil.move(tmp_path / "export" / f"{table}.parquet", tmp_path / "latest" / table / "latest.parquet")
    same_rows(tmp_path / "ran", tmp_path / "latest")
