"""Measures, on a real Flink cluster, the speed-up by a second TaskManager, and memory over many recordings.

    python -m tests.integration.fetch_flink   # once
    python -m benchmarks.flink [--recordings 1000]
    python -m benchmarks.flink --listed 10000 100000

The whole cluster is on this machine: JobManager, TaskManagers of one slot, a worker pool for each, Beam's job server.
The engine takes 40 ms per window and no CPU, as a GPU would, so this measures whether both engines are kept busy.

asking: from the first request to the last reply. job: the whole run, including the start of Flink and Beam.
With `--listed`, an engine that takes no time processes that many short recordings of an S3 server, on two
TaskManagers; RSS is the maximum of a process: of workers (which plan, run and write) and of TaskManagers.
"""

import argparse
import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from benchmarks import flink_pool, machine, synthetic_s3
from benchmarks.idle_share import make_recordings
from tests.integration.flink import flink_cluster
from tests.integration.servers import free_port, python_module, serving

POOL = "benchmarks.flink_pool"
LONGEST_S = 6.0


class Figures(NamedTuple):
    """One run: seconds of asking and in all, and the most that was resident at once, in MiB."""

    asking_s: float
    job_s: float
    pool_mib: float
    task_manager_mib: float


def run(inputs: str, folder: Path, task_managers: int, window_s: float) -> Figures:
    """A run on a cluster of its own.

    Raises:
        SystemExit: Not all of it was answered.
    """
    (folder / "spans").mkdir(parents=True)
    os.environ |= {flink_pool.WINDOW_S: str(window_s), flink_pool.SPANS: str(folder / "spans")}
    job = make_job(
        {
            "inputs": [inputs],
            "output": str(folder / "output"),
            "model": "demo",
            "tasks": ["caption"],
            "engine": flink_pool.register(),
            "device": "cpu",
            "slots": 16,
            "decode_guard": False,
        }
    )
    with (
        flink_cluster(folder / "flink", task_managers=task_managers, pool_module=POOL) as cluster,
        Resident([pool.pid for pool in cluster.pools]) as pools,
        Resident([manager.pid for manager in cluster.task_managers]) as managers,
    ):
        report = batch.run(job, cluster.flags)
    if not report.counts.reconciled or set(report.counts.states) != {"ok"}:
        raise SystemExit(f"not all was answered: {report.counts}")
    began, ended = zip(*spans(folder / "spans"), strict=True)
    return Figures(max(ended) - min(began), report.wall_s, pools.most_mib, managers.most_mib)


def spans(folder: Path) -> Iterator[tuple[float, float]]:
    """When engines worked."""
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            began, ended = map(float, line.split())
            yield began, ended


class Resident:
    """The most memory that any of these processes had at once."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most_mib = 0.0

    def __enter__(self) -> "Resident":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1):
            self.most_mib = max(self.most_mib, *map(resident_mib, self._pids))


def resident_mib(pid: int) -> float:
    """Of a process."""
    with contextlib.suppress(FileNotFoundError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def show_speed_up(folder: Path, recordings: int, window_s: float) -> None:
    """One TaskManager, then two."""
    audio = folder / "audio"
    audio.mkdir()
    make_recordings(audio, recordings, LONGEST_S)
    print(f"{recordings} recordings of one window, {window_s * 1000:.0f} ms each")
    print(f"{'TaskManagers':>12}{'asking s':>10}{'speed-up':>10}{'job s':>8}{'speed-up':>10}")
    one = None
    for task_managers in (1, 2):
        found = run(str(audio), folder / str(task_managers), task_managers, window_s)
        one = one or found
        asking, whole = one.asking_s / found.asking_s, one.job_s / found.job_s
        row = f"{task_managers:12}{found.asking_s:10.1f}{asking:10.2f}{found.job_s:8.1f}{whole:10.2f}"
        print(row, flush=True)


def show_memory(folder: Path, listed: list[int]) -> None:
    """As many recordings as each of these, one after the other."""
    print(f"{'listed':>10}{'job s':>8}{'a second':>10}{'pool MiB':>10}{'TaskManager MiB':>17}")
    port = free_port()  # one for all: s3fs keeps what it has connected to
    for count in listed:
        bucket = ["--keys", count, "--folders", 100, "--port", port]
        (folder / str(count)).mkdir()
        store = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ |= store
        with serving(python_module(synthetic_s3.__name__, *bucket), port, log=folder / str(count) / "s3.log"):
            found = run("s3://synthetic", folder / str(count), 2, 0.0)
        row = f"{count:10}{found.job_s:8.1f}{count / found.job_s:10.0f}"
        print(f"{row}{found.pool_mib:10.0f}{found.task_manager_mib:17.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=2000)
    parser.add_argument("--window-ms", type=float, default=40.0)
    parser.add_argument("--listed", type=int, nargs="+", help="memory by numbers of recordings, instead of speed")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(machine.describe())
        if asked.listed:
            show_memory(Path(name), asked.listed)
        else:
            show_speed_up(Path(name), asked.recordings, asked.window_ms / 1000)


if __name__ == "__main__":
    main()
