"""Measures a watched folder: seconds from a file's arrival to its rows, and the behaviour over an hour.

    python -m benchmarks.streaming                      # latency, with the demo model
    python -m benchmarks.streaming --soak 3600          # 5 files a second, an engine of constant time
    python -m benchmarks.streaming --soak 3600 --flink  # on a cluster on this machine (benchmarks/flink.py)

Files of 2 s appear by a rename, as an atomic writer creates them; one in a hundred is corrupt. Rows count as written
when a reader of `recordings/` sees them. The runner is Prism, with its worker in this process, or Flink: two
TaskManagers of one slot.
"""

import argparse
import contextlib
import itertools
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from af3pipe import storage
from af3pipe.pipelines.job import make_job
from af3pipe.pipelines.streaming import Watch
from af3pipe.tables.reconcile import read_rows
from benchmarks import constant_engine, flink_pool
from benchmarks.machine import children, cpu_s, describe
from tests.integration.flink import flink_cluster

RATE = 16_000
CORRUPT_EVERY = 100


class Seen(NamedTuple):
    """When files landed, and when their rows were there; by path."""

    landed_s: dict[str, float]
    visible_s: dict[str, float]


def clips(folder: Path, number: int) -> list[Path]:
    """Recordings of 2 s, cut from those of the demo and each a little different."""
    draw = random.Random(7)
    with resources.as_file(resources.files("af3pipe.demo") / "clips") as found:
        sounds = [
            path for path in sorted(found.glob("*.flac")) if "command_go" not in path.name and path.stem != "corrupt"
        ]
        pcm = np.concatenate([soundfile.read(path, dtype="float32")[0] for path in sounds])
    made = []
    for index in range(number):
        start = draw.randrange(len(pcm) - 2 * RATE)
        path = folder / f"clip{index}.flac"
        soundfile.write(path, pcm[start : start + 2 * RATE] * draw.uniform(0.5, 0.9), RATE)
        made.append(path)
    return made


def land(
    sources: list[Path], folder: Path, every_s: float, stop: threading.Event, landed_s: dict[str, float]
) -> None:
    """Files by a rename, one after the other at a fixed pace."""
    began = time.monotonic()
    for index in itertools.count():
        if stop.wait(max(0.0, began + index * every_s - time.monotonic())):
            return
        path = folder / f"{index // 1000:03}" / f"{index:06}.flac"
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        shutil.copyfile(sources[index % len(sources)], part)
        if index % CORRUPT_EVERY == CORRUPT_EVERY - 1:
            part.write_bytes(b"fLaC" + bytes(2000))
        part.rename(path)
        landed_s[str(path)] = time.time()


def look(output: Path, visible_s: dict[str, float], stop: threading.Event) -> None:
    """Reads what is new in `recordings/`, five times a second."""
    known: set[Path] = set()
    while not stop.wait(0.2):
        for path in set((output / "recordings").glob("*.parquet")) - known:
            now = time.time()
            known.add(path)
            for row in read_rows([str(path)], ["uri"]):
                visible_s.setdefault(row["uri"], now)


def memory_mib() -> tuple[float, float]:
    """Of all Python (this process, workers, decoders), and of the runner (Prism, or all of Flink)."""
    own = runner = 0.0
    for pid in ("self", *children()):
        with contextlib.suppress(OSError):
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            size = int(status["VmRSS"].split()[0]) / 1024
            if status["Name"].strip() in ("prism", "java"):
                runner += size
            else:
                own += size
    return own, runner


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@contextlib.contextmanager
def cluster_flags(root: Path) -> Iterator[list[str]]:
    """Of a Flink cluster; says how many checkpoints it made."""
    (root / "spans").mkdir()
    os.environ |= {flink_pool.WINDOW_S: str(constant_engine.window_s), flink_pool.SPANS: str(root / "spans")}
    with flink_cluster(root / "flink", pool_module=flink_pool.__name__) as cluster:
        yield cluster.flags
        (job,) = cluster.jobs()
        print("checkpoints:", cluster.ask(f"/jobs/{job['jid']}/checkpoints")["counts"])


def run(args: argparse.Namespace, root: Path, flags: list[str]) -> None:
    (root / "in").mkdir()
    (root / "clips").mkdir()
    sources = clips(root / "clips", 40)
    constant = args.soak is not None
    if constant:
        flink_pool.register() if args.flink else constant_engine.register()
    job = make_job(
        {
            "inputs": [str(root / "in")],
            "output": str(root / "out"),
            "model": "demo",
            "engine": "constant" if constant else "transformers",
            "tasks": ["caption"],
            "max_new_tokens": 24,
            "watch": {"every": args.every, "window": args.window, "pane_every": args.pane_every},
        }
    )
    seconds = args.soak if constant else args.files * args.pause_s
    pace_s = 1 / args.files_per_s if constant else args.pause_s
    landed_s: dict[str, float] = {}
    visible_s: dict[str, float] = {}
    stop_landing, stop_looking = threading.Event(), threading.Event()
    watch = Watch(job, flags)
    started = time.monotonic()
    writer = threading.Thread(target=land, args=(sources, root / "in", pace_s, stop_landing, landed_s))
    reader = threading.Thread(target=look, args=(root / "out", visible_s, stop_looking))
    writer.start()
    reader.start()
    if constant:
        print("| minute | landed | visible | Python (MiB) | runner (MiB) | CPU |")
        print("|---|---|---|---|---|---|")
    next_s = 0.0
    while time.monotonic() - started < seconds and not watch.wait(1.0):
        if constant and time.monotonic() - started >= next_s:
            own, runner = memory_mib()
            print(
                f"| {next_s / 60:.0f} | {len(landed_s)} | {len(visible_s)} | {own:.0f} | {runner:.0f} "
                f"| {cpu_s():.0f} s |",
                flush=True,
            )
            next_s += max(60.0, seconds / 12)
    stop_landing.set()
    writer.join()
    if not constant:
        time.sleep(args.every + args.pane_every + 5)
    time.sleep(2 * args.every)  # so that the last ones are seen twice
    watch.stop()
    while not watch.wait(1.0):
        pass
    report = watch.report()
    time.sleep(1)
    stop_looking.set()
    reader.join()
    tell(report, Seen(landed_s, visible_s), root / "out")


def tell(report: object, seen: Seen, output: Path) -> None:
    waits = [at - seen.landed_s[uri] for uri, at in seen.visible_s.items() if uri in seen.landed_s]
    rows = list(read_rows(storage.list_files(str(output / "recordings")), ["uri", "terminal_state"]))
    uris = [row["uri"] for row in rows]
    states = Counter(row["terminal_state"] for row in rows)
    print(f"\nOn {describe()}")
    print(f"landed {len(seen.landed_s)}, rows {len(uris)}, different {len(set(uris))}, {states}")
    print(f"never seen: {len(set(seen.landed_s) - set(uris))}; report: {report}")
    print("\n| landed to visible | p50 | p95 | max |\n|---|---|---|---|")
    p50, p95 = statistics.median(waits), percentile(waits, 0.95)
    print(f"| {len(waits)} files | {p50:.1f} s | {p95:.1f} s | {max(waits):.1f} s |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=40, help="how many, for the latency")
    parser.add_argument("--pause-s", type=float, default=4.1, help="between two, for the latency")
    parser.add_argument("--soak", type=float, help="seconds")
    parser.add_argument("--files-per-s", type=float, default=5.0)
    parser.add_argument("--every", type=float, default=2.0)
    parser.add_argument("--window", type=float, default=300.0)
    parser.add_argument("--pane-every", type=float, default=2.0)
    parser.add_argument("--folder", help="keeps the files; the default is a temporary one")
    parser.add_argument("--flink", action="store_true", help="with --soak")
    args, beam_flags = parser.parse_known_args()
    if args.flink and args.soak is None:
        parser.error("--flink needs --soak: its workers have the constant engine")
    if not args.flink and shutil.which("prism") is None:
        print("Prism is not on the path; Beam will try to download it")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(args.folder or folder)
        root.mkdir(exist_ok=True)
        with cluster_flags(root) if args.flink else contextlib.nullcontext([]) as flags:
            run(args, root, [*flags, *beam_flags])


if __name__ == "__main__":
    main()
