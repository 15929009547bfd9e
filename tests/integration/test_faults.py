"""A thousand recordings through a store that spoils a tenth of all calls: nothing lost, nothing twice, tries bounded."""

import json
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pyarrow.dataset as ds
import pytest

from af3pipe import storage
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from benchmarks import constant_engine
from tests import fixtures_audio as make
from tests.integration.fault_proxy import AFTER_THE_WORK, KINDS
from tests.integration.servers import S3, free_port, python_module, serving, store_server, using

pytestmark = pytest.mark.integration
RECORDINGS = 1000
LOST = ("0123.wav", "0777.wav")
NAMES = [f"{number:04}.wav" for number in range(RECORDINGS)]
# Short, so that a stall is soon known for one.
PATIENCE = {"config_kwargs": {"read_timeout": 1}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with store_server(S3, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def faulty(server, tmp_path):
    port = free_port()
    options = [port, server.port, "--share", 0.1, "--seed", 1, "--stall-s", 2, "--slow-s", 0.3]
    options += [option for name in LOST for option in ("--always-fail", f"GET /archive/in/{name}")]
    options += ["--lose-first-answer", ".parquet"]
    proxy = python_module("tests.integration.fault_proxy", *options)
    with (
        serving(proxy, port, log=tmp_path / "proxy.log"),
        using(server.behind(port, **PATIENCE)) as found,
    ):
        yield found


def tally(store):
    with urllib.request.urlopen(f"http://127.0.0.1:{store.port}/_faults") as response:
        return json.load(response)


def test_a_thousand_recordings_through_faults(server, faulty, monkeypatch):
    recordings = {name: make.wav(make.sound(0.3, 16_000, seed=number), 16_000) for number, name in enumerate(NAMES)}
    import time
    t=time.time()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.write_atomic(faulty.url(f"archive/in/{name}"), recordings[name]), NAMES))
    print("put", time.time()-t); before=tally(faulty)
    stored = server.fs.cat(server.fs.find("archive/in"))
    assert {path.rpartition("/")[2]: data for path, data in stored.items()} == recordings

    monkeypatch.setattr(constant_engine, "window_s", 0)
    t=time.time()
    report = batch.run(
        make_job(
            {
                "inputs": [faulty.url("archive/in")],
                "output": faulty.url("labels/out"),
                "model": "demo",
                "tasks": ["caption", "transcript"],
                "engine": constant_engine.register(),
                "device": "cpu",
            }
        )
    )
    print("run", time.time()-t)
    told=tally(faulty)
    print({k:v for k,v in told.items() if k!="calls"}, Counter({k:v for k,v in told["calls"].items()}).most_common(25), Counter(told["calls"].values()))
    print({k:v for k,v in told["calls"].items() if "labels" in k})
    print(before["injected"])
    print(report)
    assert report.counts.reconciled, report.counts.problems
