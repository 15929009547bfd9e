"""Runs a job repeatedly in processes that are killed (-9) at a step of writing, or after a time.

    python -m tests.integration.killed_run JOB.json KILLS.json

A step is a file synced or renamed: killed before it or after it, a run leaves half a file, or one file less than it
meant to. The processes are forks of one that has imported everything, which takes longer than such a run.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from benchmarks import constant_engine


def killed_at(step):
    """Kills this process before (even) or after (odd) a step."""
    steps = iter(range(sys.maxsize))
    lock = threading.Lock()

    def counted(call):
        def stepped(*args, **kwargs):
            with lock:
                number = next(steps)
            if step == 2 * number:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if step == 2 * number + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return stepped

    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)
    return lambda: 2 * next(steps)


def run(job, kill):
    """Exit status of a run in a fork, and what it tells; `kill` is {"step": n}, {"after_s": s} or empty."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            steps = killed_at(kill.get("step", -1))
            report = batch.run(make_job(job))
            os.write(tell, json.dumps({"steps": steps(), "states": report.counts.states}).encode())
            status = 0 if report.counts.reconciled else 3
        finally:
            os._exit(status)
    os.close(tell)
    if "after_s" in kill:
        time.sleep(kill["after_s"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(told) as pipe:
        found = pipe.read()
    return os.waitstatus_to_exitcode(status), json.loads(found or "{}")


def main():
    constant_engine.window_s = 0.0
    job = json.loads(Path(sys.argv[1]).read_text()) | {"engine": constant_engine.register()}
    for kill in json.loads(Path(sys.argv[2]).read_text()):
        output = str(Path(job["output"]) / kill.pop("output", "."))
        status, found = run(job | {"output": output}, kill)
        print(json.dumps({"output": output, "kill": kill, "status": status, **found}), flush=True)


if __name__ == "__main__":
    main()
