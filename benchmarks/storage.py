"""Measures the cost of storage and tables: listings, runs of many small files, their reruns, and memory by rows.

    python -m benchmarks.storage                      # all of it; takes hours on two cores with the real model
    python -m benchmarks.storage listing              # --keys 10000 100000 1000000 --folders 1000 0
    python -m benchmarks.storage rerun                # --files 10000 --engines constant demo --store local|s3
    python -m benchmarks.storage memory               # --recordings 1000 10000 100000
    python -m benchmarks.storage chunks               # --chunks 250 1000 4000 --chunked 4000
    python -m benchmarks.storage tables               # --rows 3000000: audit, compact, export of so many
    python -m benchmarks.storage nights               # --files 100000 --nights 30: reruns with nothing new
    python -m benchmarks.storage new                  # --rows 3000000 --files 1000: new files, a large output

Each measurement runs in its own process. Objects in S3 are those of benchmarks/synthetic_s3.py, served by another
process: no figure includes a network. Files on the local disk are 0.3 s of WAV each, hard links to a few, so that
100,000 take no space; each counts as its own recording. `constant`: the engine of benchmarks/constant_engine.py
instead of the model, taking no time; `demo`: the demo checkpoint, with `af3pipe run`. Peak: maximum resident memory,
as Linux counts it; `before`: the same at the start of the work, after all imports.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import constant_engine, machine
from benchmarks.memory import peak_mib
from benchmarks.synthetic_output import write_output
from benchmarks.synthetic_s3 import tone

PARTS = ("listing", "rerun", "memory", "chunks", "tables", "nights", "new")
FILE_S = 0.3
FIND_MOST_KEYS = 100_000
_PER_FOLDER = 1000
_LINKS = 20_000  # of one file: file systems allow some ten thousand


def make_files(folder: Path, count: int) -> None:
    """Writes recordings of 0.3 s, 1,000 a folder."""
    for number in range(count):
        path = folder / f"{number // _PER_FOLDER:04}" / f"{number:06}.wav"
        if number % _PER_FOLDER == 0:
            path.parent.mkdir()
        if number % _LINKS == 0:
            source = path
            path.write_bytes(tone(FILE_S))
        else:
            os.link(source, path)


@contextmanager
def s3(keys: int, folders: int, delay_s: float) -> Iterator[str]:
    """A server in a process of its own; the environment says where it is while the context lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["--keys", str(keys), "--folders", str(folders), "--seconds", str(FILE_S), "--delay", str(delay_s)]
    command = [sys.executable, "-m", "benchmarks.synthetic_s3", *given, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            yield "s3://synthetic/"
        finally:
            server.kill()


def apart(work: Callable[..., dict[str, float]], **given: Any) -> dict[str, float]:
    """What `work` finds in a process of its own; `process_s`: how long all of that lasted, beginning to end."""
    began, cpu_s = time.perf_counter(), machine.cpu_s()
    command = [sys.executable, "-m", "benchmarks.storage", "--do", work.__name__, json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"process_s": time.perf_counter() - began, "process_cpu_s": machine.cpu_s() - cpu_s}


def list_keys(url: str, way: str) -> dict[str, float]:
    """One listing, nothing kept of it."""
    import fsspec

    from af3pipe import storage

    before, cpu_s, began = peak_mib(), machine.cpu_s(), time.perf_counter()
    if way == "ours":
        keys = iter(storage.list_objects(url))
    else:
        fs, path = fsspec.core.url_to_fs(url)
        keys = iter(fs.find(path))
    next(keys)
    first_s = time.perf_counter() - began
    count = 1 + sum(1 for _ in keys)
    return {
        "keys": count,
        "first_s": first_s,
        "wall_s": time.perf_counter() - began,
        "cpu_s": machine.cpu_s() - cpu_s,
        "before": before,
        "peak": peak_mib(),
    }


def run_job(
    source: str, output: str, *, chunk: int = 1000, guard: bool = True, may_open: bool = True
) -> dict[str, float]:
    """A run of the batch pipeline with the constant engine; `may_open` False: one that fails if it is opened."""
    from af3pipe.models.engine import ENGINES
    from af3pipe.pipelines import batch
    from af3pipe.pipelines.job import JobConfig

    constant_engine.window_s = 0.0
    engine = constant_engine.register()
    if not may_open:
        ENGINES[engine] = f"{__name__}:NoEngine"
    job = JobConfig(
        inputs=(source,),
        output=output,
        model="demo",
        engine=engine,
        device="cpu",  # or torch would be loaded, to look for GPUs
        chunk_recordings=chunk,
        decode_guard=guard,
    )
    before, cpu_s = peak_mib(), machine.cpu_s()
    began, to_plan_s = time.perf_counter(), [0.0]

    def watch(progress: batch.Progress) -> None:
        # All that is found is counted at the moment when all of it is planned.
        if progress.found and not to_plan_s[0]:
            to_plan_s[0] = time.perf_counter() - began

    report = batch.run(job, on_progress=watch, progress_every_s=0.02)
    if not report.counts.reconciled:
        raise SystemExit(f"the counts do not reconcile: {report.counts.problems}")
    return {
        "before": before,
        "peak": peak_mib(),
        "wall_s": report.wall_s,
        "cpu_s": machine.cpu_s() - cpu_s,
        "plan_s": to_plan_s[0],
        "found": report.counts.found,
        "answers": sum(report.counts.answers.values()),
    }


class NoEngine:
    """Fails the run that opens it."""

    def __init__(self, options: object) -> None:
        raise SystemExit("the engine was opened")


def run_demo(source: str, output: str, *, may_open: bool = True) -> dict[str, float]:
    """`af3pipe run` with the demo checkpoint, as one starts it; `may_open` False: where torch cannot be imported."""
    with tempfile.TemporaryDirectory() as name:
        environment = dict(os.environ)
        if not may_open:
            Path(name, "torch.py").write_text("raise ImportError('the engine was opened')\n")
            environment["PYTHONPATH"] = os.pathsep.join([name, str(Path.cwd()), environment.get("PYTHONPATH", "")])
        began = time.perf_counter()
        command = [sys.executable, "-m", "af3pipe", "run", source, "--output", output, "--model", "demo"]
        subprocess.run([*command, "--device", "cpu"], stdout=sys.stderr, check=True, env=environment)
        return {"wall_s": time.perf_counter() - began, **_rows_of_last_run(output)}


def _rows_of_last_run(output: str) -> dict[str, float]:
    record = json.loads(max(Path(output, "_runs").glob("*Z-??????.json")).read_text())
    return {"found": record["recordings_found"], "answers": sum(record["answers"].values())}


def use_tables(what: str, output: str) -> dict[str, float]:
    """One command on an output, in this process."""
    from af3pipe.tables.audit import audit
    from af3pipe.tables.compact import compact
    from af3pipe.tables.latest import export_latest

    before, cpu_s, began = peak_mib(), machine.cpu_s(), time.perf_counter()
    found: dict[str, float] = {}
    if what == "audit":
        report = audit(output)
        found = {"problems": len(report.problems), "rows": sum(report.rows.values())}
    elif what == "export":
        found = {"rows": sum(export_latest(output, f"{output}-export", ["captions"]).values())}
    else:
        done = compact(output, only_latest="--latest" in what)
        found = {"rows": done.rows, "dropped": done.duplicates + done.superseded}
    wall_s = time.perf_counter() - began
    return found | {"before": before, "peak": peak_mib(), "wall_s": wall_s, "cpu_s": machine.cpu_s() - cpu_s}


WORK = {work.__name__: work for work in (list_keys, run_job, run_demo, use_tables)}


def show(*cells: Any) -> None:
    """A row of a Markdown table."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def heads(*names: str) -> None:
    print()
    show(*names)
    show(*["---"] * len(names))


def listing(asked: argparse.Namespace) -> None:
    heads(
        "keys",
        "folders",
        "answer ms",
        "way",
        "s",
        "keys/s",
        "CPU s",
        "first after s",
        "before MiB",
        "peak MiB",
        "grown MiB",
    )
    for folders in asked.folders:
        for keys in asked.keys:
            with s3(keys, folders, asked.delay_ms / 1000) as url:
                for way in ("ours", "fs.find"):
                    if way == "ours" or keys <= FIND_MOST_KEYS:
                        found = apart(list_keys, url=url, way=way)
                        assert found["keys"] == keys
                        show(
                            f"{keys:,}",
                            f"{folders:,}",
                            f"{asked.delay_ms:.0f}",
                            way,
                            f"{found['wall_s']:.1f}",
                            f"{keys / found['wall_s']:,.0f}",
                            f"{found['cpu_s']:.1f}",
                            f"{found['first_s']:.2f}",
                            f"{found['before']:.0f}",
                            f"{found['peak']:.0f}",
                            f"{found['peak'] - found['before']:.0f}",
                        )


@contextmanager
def source_of(asked: argparse.Namespace, count: int) -> Iterator[str]:
    """Where so many recordings are."""
    if asked.store == "s3":
        with s3(count, -(-count // _PER_FOLDER), asked.delay_ms / 1000) as url:
            yield url
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_files(Path(folder), count)
            yield folder


def rerun(asked: argparse.Namespace) -> None:
    heads(
        "files",
        "engine",
        "store",
        "first run s",
        "CPU s",
        "ms a file",
        "rerun s",
        "CPU s",
        "rerun / first",
        "of CPU",
        "engine opened again",
    )
    for name in asked.engines:
        run = run_demo if name == "demo" else run_job
        with source_of(asked, asked.files) as source, tempfile.TemporaryDirectory() as output:
            first = apart(run, source=source, output=output)
            again = apart(run, source=source, output=output)
            # A third time, where opening the engine would fail the run.
            apart(run, source=source, output=output, may_open=False)
            assert (first["answers"], again["answers"], again["found"]) == (asked.files, 0, asked.files)
            show(
                f"{asked.files:,}",
                name,
                asked.store,
                f"{first['process_s']:.1f}",
                f"{first['process_cpu_s']:.1f}",
                f"{1000 * first['process_s'] / asked.files:.2f}",
                f"{again['process_s']:.1f}",
                f"{again['process_cpu_s']:.1f}",
                f"{again['process_s'] / first['process_s']:.1%}",
                f"{again['process_cpu_s'] / first['process_cpu_s']:.1%}",
                "no",
            )


def memory(asked: argparse.Namespace) -> None:
    heads("recordings", "wall s", "ms each", "CPU ms each", "before MiB", "peak MiB", "peak / that of the fewest")
    fewest: float | None = None
    for count in asked.recordings:
        with source_of(asked, count) as source, tempfile.TemporaryDirectory() as output:
            found = apart(run_job, source=source, output=output, guard=asked.guard)
            assert found["answers"] == count
            fewest = fewest or found["peak"]
            show(
                f"{count:,}",
                f"{found['wall_s']:.1f}",
                f"{1000 * found['wall_s'] / count:.2f}",
                f"{1000 * found['cpu_s'] / count:.2f}",
                f"{found['before']:.0f}",
                f"{found['peak']:.0f}",
                f"{found['peak'] / fewest:.3f}",
            )


def chunks(asked: argparse.Namespace) -> None:
    """By the size of a chunk; what one costs beyond its recordings is the slope of the time over their number."""
    heads("recordings", "a chunk", "chunks", "plan ms each", "wall s", "CPU s", "CPU ms each", "peak MiB")
    points = []
    with source_of(asked, asked.chunked) as source:
        for size in asked.chunks:
            with tempfile.TemporaryDirectory() as output:
                found = apart(run_job, source=source, output=output, guard=asked.guard, chunk=size)
            number = -(-asked.chunked // size)
            points.append((number, found["cpu_s"]))
            show(
                f"{asked.chunked:,}",
                f"{size:,}",
                number,
                f"{1000 * found['plan_s'] / asked.chunked:.2f}",
                f"{found['wall_s']:.1f}",
                f"{found['cpu_s']:.1f}",
                f"{1000 * found['cpu_s'] / asked.chunked:.2f}",
                f"{found['peak']:.0f}",
            )
    if len(points) > 1:
        slope, rest = statistics.linear_regression(*zip(*points, strict=True))
        print(f"\nCPU: {slope:.2f} s a chunk, and {1000 * rest / asked.chunked:.2f} ms a recording")


def tables(asked: argparse.Namespace) -> None:
    """Two answers a recording, so that two thirds of the rows are answers; of a hundredth there is a copy."""
    heads("rows", "files", "what", "wall s", "CPU s", "before MiB", "peak MiB")
    for rows in asked.rows:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "out")
            count = write_output(output, rows // 3, reruns=asked.reruns, rows_per_file=asked.rows_per_file)
            problems = [1, 0]  # the copies, until they are compacted
            for what in ("audit", "compact", "compact --latest", "audit", "export"):
                files = sum(1 for _ in output.rglob("*.parquet"))
                found = apart(use_tables, what=what, output=str(output))
                assert what != "audit" or found["problems"] == problems.pop(0), found
                show(
                    f"{count:,}",
                    files,
                    what,
                    f"{found['wall_s']:.1f}",
                    f"{found['cpu_s']:.1f}",
                    f"{found['before']:.0f}",
                    f"{found['peak']:.0f}",
                )


def nights(asked: argparse.Namespace) -> None:
    """What a rerun costs after many that found nothing new: as much as the second run."""
    heads("files", "night", "wall s", "CPU s", "CPU / night 2", "files of the output", "peak MiB")
    with source_of(asked, asked.files) as source, tempfile.TemporaryDirectory() as output:
        second = 0.0
        for night in range(1, asked.nights + 1):
            found = apart(run_job, source=source, output=output, guard=asked.guard)
            second = found["cpu_s"] if night == 2 else second
            if night in (1, 2, 3, asked.nights // 2, asked.nights - 1, asked.nights):
                show(
                    f"{asked.files:,}",
                    night,
                    f"{found['wall_s']:.1f}",
                    f"{found['cpu_s']:.1f}",
                    f"{found['cpu_s'] / second:.2f}" if second else "",
                    sum(1 for _ in Path(output).rglob("*.parquet")),
                    f"{found['peak']:.0f}",
                )


def new(asked: argparse.Namespace) -> None:
    """What new files cost beside their own work, where the output holds many recordings already."""
    heads("recordings in the output", "rows", "new files", "wall s", "CPU s", "CPU beyond their own work", "peak MiB")
    with source_of(asked, asked.files) as source, tempfile.TemporaryDirectory() as folder:
        own = apart(run_job, source=source, output=f"{folder}/empty", guard=asked.guard)
        for recordings in [0, *(rows // 3 for rows in asked.rows)]:
            output = Path(folder, f"out{recordings}")
            rows = write_output(output, recordings) if recordings else 0
            found = apart(run_job, source=source, output=str(output), guard=asked.guard)
            assert found["answers"] == asked.files
            show(
                f"{recordings:,}",
                f"{rows:,}",
                asked.files,
                f"{found['wall_s']:.1f}",
                f"{found['cpu_s']:.1f}",
                f"{found['cpu_s'] - own['cpu_s']:.1f}",
                f"{found['peak']:.0f}",
            )


WAYS = {way.__name__: way for way in (listing, rerun, memory, chunks, tables, nights, new)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--keys", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folders", type=int, nargs="+", default=[1000, 0], help="0: all keys at the top")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="before each answer of the S3 server")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--engines", nargs="+", choices=["constant", "demo"], default=["constant", "demo"])
    parser.add_argument("--store", choices=["local", "s3"], default="local", help="where the recordings are")
    parser.add_argument("--recordings", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--chunks", type=int, nargs="+", default=[250, 1000, 4000], help="recordings in each")
    parser.add_argument("--chunked", type=int, default=4000, help="recordings of each run of `chunks`")
    parser.add_argument("--rows", type=int, nargs="+", default=[300_000, 3_000_000], help="of the output of `tables`")
    parser.add_argument("--reruns", type=int, default=0, help="runs of `tables` that answer a tenth again")
    parser.add_argument("--rows-per-file", type=int, default=50_000, help="of the output of `tables`")
    parser.add_argument("--nights", type=int, default=30, help="runs of `nights`")
    parser.add_argument("--guard", action="store_true", help="decode in processes of their own, as by default")
    parser.add_argument("--do", nargs=2, metavar=("WORK", "GIVEN"), help="one measurement, in this process")
    asked = parser.parse_args()
    if asked.do:
        print(json.dumps(WORK[asked.do[0]](**json.loads(asked.do[1]))))
        return
    print(machine.describe())
    for part in asked.parts or PARTS:
        WAYS[part](asked)


if __name__ == "__main__":
    main()
