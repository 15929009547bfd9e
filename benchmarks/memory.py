"""Measures whether the peak memory of the batch pipeline grows with the number of recordings.

    python -m benchmarks.memory [--recordings 200 1000] [--repeat 3]

It runs the whole pipeline, writing included, in a new process each time. The constant engine, at 10 ms per window, is
slower than decoding, so decoded audio would pile up if it were not bounded. Peak: maximum resident memory, as Linux
counts it; `before`: the same at the start of the run, after all imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import constant_engine, machine
from benchmarks.idle_share import make_recordings

WINDOW_S = 0.010
LONGEST_S = 6.0


def peak_mib(pid: int | str = "self") -> float:
    # Not getrusage: there a new process begins with the peak of the one that started it.
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def run(folder: Path, output: Path) -> dict[str, float]:
    """One run in this process: its peak before and after, and its answers."""
    from af3pipe.pipelines import batch
    from af3pipe.pipelines.job import JobConfig

    constant_engine.window_s = WINDOW_S
    engine = constant_engine.register()
    job = JobConfig(inputs=[str(folder)], output=str(output), model="demo", engine=engine, tasks=["caption"])
    before = peak_mib()
    report = batch.run(job)
    return {
        "before": before,
        "peak": peak_mib(),
        "wall_s": report.wall_s,
        "answers": sum(report.counts.answers.values()),
    }


def measure(folder: Path) -> dict[str, float]:
    """A run in a process of its own."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "benchmarks.memory", "--run", str(folder), output]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--run", type=Path, nargs=2, metavar=("FOLDER", "OUTPUT"), help="one run, in this process")
    asked = parser.parse_args()
    if asked.run:
        print(json.dumps(run(*asked.run)))
        return
    print(machine.describe())
    heads = f"{'recordings':>10}{'audio s':>9}{'answers':>9}{'wall s':>8}"
    print(f"{heads}{'before MiB':>12}{'peak MiB':>10}{'grown MiB':>11}")
    for count in asked.recordings:
        with tempfile.TemporaryDirectory() as name:
            audio_s = make_recordings(Path(name), count, LONGEST_S)
            runs = [measure(Path(name)) for _ in range(asked.repeat)]
        found = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        row = f"{count:10}{audio_s:9.0f}{found['answers']:9.0f}{found['wall_s']:8.1f}"
        print(f"{row}{found['before']:12.0f}{found['peak']:10.0f}{found['peak'] - found['before']:11.0f}", flush=True)


if __name__ == "__main__":
    main()
