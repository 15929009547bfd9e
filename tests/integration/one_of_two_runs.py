"""Runs a job in a process that waits for a line before it starts, so that two runs can be started in parallel.

    python -m tests.integration.one_of_two_runs BASE FIRST LAST

It asks about the recordings FIRST to LAST (not included) below BASE/archive, and a broken one, into BASE/labels/out.
"""

import json
import sys

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from benchmarks import constant_engine

if __name__ == "__main__":
    base, first, last = sys.argv[1:]
    constant_engine.window_s = 0.02  # long enough that the two are at work together
    job = make_job(
        {
            "inputs": [
                *(f"{base}/archive/{number:03}.wav" for number in range(int(first), int(last))),
                f"{base}/archive/broken.wav",
            ],
            "output": f"{base}/labels/out",
            "model": "demo",
            "tasks": ["caption", "transcript"],
            "engine": constant_engine.register(),
            "decode_guard": False,
        }
    )
    print("ready", flush=True)
    sys.stdin.readline()
    report = batch.run(job)
    print(json.dumps({"run_id": report.run_id, "problems": report.counts.problems}))
