"""Runs Beam's worker pool with the constant engine, for benchmarks/flink.py: workers are threads of this process.

    AF3PIPE_WINDOW_S=0.04 AF3PIPE_SPANS=FOLDER python -m benchmarks.flink_pool 127.0.0.2:50000

The begin and end of each processed batch, in seconds since 1970, are appended to FOLDER/<pid>.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from af3pipe.models.engine import ENGINES
from af3pipe.models.scheduler import Job
from benchmarks import constant_engine
from tests.integration.worker_pool import serve

WINDOW_S = "AF3PIPE_WINDOW_S"
SPANS = "AF3PIPE_SPANS"


class TimedEngine(constant_engine.ConstantEngine):
    """Records when it worked."""

    def _answer(self, jobs: Sequence[Job]) -> None:
        began = time.time()
        super()._answer(jobs)
        with Path(os.environ[SPANS], str(os.getpid())).open("a") as spans:
            spans.write(f"{began} {time.time()}\n")


def register() -> str:
    """Makes the engine known in this process, and gives its name."""
    constant_engine.window_s = float(os.environ[WINDOW_S])
    ENGINES["constant"] = f"{__name__}:TimedEngine"
    return "constant"


if __name__ == "__main__":
    from benchmarks import flink_pool  # by its own name, under which workers find it

    flink_pool.register()
    serve(sys.argv[1], use_process=False)
