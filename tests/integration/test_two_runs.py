"""Two runs into one folder at the same time: each reconciles, no file is harmed, nothing is lost between them."""

import json
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import fixtures_audio as make
from tests.integration.servers import BUCKETS, STORES, python_module, store_server, using

pytestmark = pytest.mark.integration
RECORDINGS = [f"{number:03}.wav" for number in range(60)]
SHARED = RECORDINGS[20:40]
"""What both runs are asked for."""
TABLES = ("captions", "transcripts", "recordings", "dead_letters")
PROGRAM = """
import sys, time
from pathlib import Path
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from benchmarks import constant_engine

archive, output, first, last, ready, go = sys.argv[1:]
constant_engine.window_s = 0.02
inputs = [f"{archive}/{number:03}.wav" for number in range(int(first), int(last))]
job = make_job(
    {
        "inputs": [*inputs, f"{archive}/broken.wav"],
        "output": output,
        "model": "demo",
        "tasks": ["caption", "transcript"],
        "engine": constant_engine.register(),
        "device": "cpu",
    }
)
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.01)
report = batch.run(job)
assert report.counts.reconciled, report.counts.problems
assert report.counts.states == {"ok": len(inputs), "dead_letter": 1}, report.counts.states
print(report.run_id)
"""
"""One run, which waits for the other so that both begin together."""


@pytest.fixture(params=["local", *STORES])
def place(request, tmp_path):
    """A folder for the archive and one for the output, and how to list and read what is in the latter."""
    if request.param == "local":
        for bucket in BUCKETS:
            (tmp_path / bucket).mkdir()
        yield LocalPlace(str(tmp_path))
        return
    with store_server(request.param, tmp_path) as store, using(store):
        yield StorePlace(store)


class LocalPlace:
    def __init__(self, folder):
        self.base = folder

    def put(self, path, data):
        Path(self.base, path).write_bytes(data)

    def files(self, folder):
        return [path for path in Path(self.base, folder).rglob("*") if path.is_file()]

    def read(self, path):
        return path.read_bytes()


class StorePlace:
    def __init__(self, store):
        self.base = store.url("").rstrip("/") + "/"
        self._store = store

    def put(self, path, data):
        self._store.fs.pipe_file(path, data)

    def files(self, folder):
        return self._store.fs.find(folder)

    def read(self, path):
        return self._store.fs.cat_file(path)
