"""A thousand recordings by a store that spoils a tenth of all calls: nothing lost, nothing twice, tries bounded."""

import contextlib
import json
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from af3pipe import storage
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from benchmarks import constant_engine
from tests import fixtures_audio as make
from tests.integration.fault_proxy import KINDS
from tests.integration.servers import S3, free_port, python_module, serving, store_server, using
from tests.tables import read_table

pytestmark = pytest.mark.integration
NAMES = [f"{number:04}.wav" for number in range(1000)]
LOST = {"0123.wav": "503", "0777.wav": "reset"}
"""Recordings that cannot be read, and what happens whenever they are."""
TABLES = ("captions", "transcripts")
TRIES, CLIENT_TRIES = 5, 2
"""Ours of a read, and the HTTP client's own, of a connection that is reset, within each of them."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with store_server(S3, tmp_path_factory.mktemp("server")) as found:
        yield found


@contextlib.contextmanager
def spoiled(server, log, *options, patience_s=1):
    """Has s3:// mean the server behind a proxy. botocore would try again within each try of s3fs."""
    port = free_port()
    proxy = python_module("tests.integration.fault_proxy", port, server.port, *options)
    client = {"config_kwargs": {"read_timeout": patience_s, "retries": {"total_max_attempts": 1}}}
    with serving(proxy, port, log=log), using(server.behind(port, **client)) as found:
        yield found


def tally(store):
    with urllib.request.urlopen(f"http://127.0.0.1:{store.port}/_faults") as response:
        return json.load(response)


def run(inputs, output, monkeypatch):
    monkeypatch.setattr(constant_engine, "window_s", 0)
    return batch.run(
        make_job(
            {
                "inputs": [inputs],
                "output": output,
                "model": "demo",
                "tasks": ["caption", "transcript"],
                "engine": constant_engine.register(),
                "device": "cpu",
            }
        )
    )


def rows(folder):
    return read_table(folder).to_pylist()


def test_a_thousand_recordings_through_faults(server, tmp_path, monkeypatch):
    options = ["--share", 0.1, "--seed", 1, "--stall-s", 2, "--slow-s", 0.3, "--lose-first-answer", ".parquet"]
    for name, kind in LOST.items():
        options += ["--always-fail", f"GET /archive/in/{name}={kind}"]
    recordings = {name: make.wav(make.sound(0.3, 16_000, seed=number), 16_000) for number, name in enumerate(NAMES)}
    with spoiled(server, tmp_path / "proxy.log", *options) as faulty:
        # Only writes in this number meet every fault of a write.
        with ThreadPoolExecutor(16) as pool:
            list(
                pool.map(
                    lambda item: storage.write_atomic(faulty.url(f"archive/in/{item[0]}"), item[1]),
                    recordings.items(),
                )
            )
        report = run(faulty.url("archive/in"), faulty.url("labels/out"), monkeypatch)
        told = tally(faulty)

    stored = server.fs.cat(server.fs.find("archive/in"))
    assert {storage.name(path): data for path, data in stored.items()} == recordings

    answered = set(NAMES) - set(LOST)
    assert report.counts.reconciled, report.counts.problems
    assert report.counts.states == {"ok": len(answered), "dead_letter": len(LOST)}
    assert Counter(storage.name(row["uri"]) for row in rows("s3://labels/out/recordings")) == Counter(NAMES)
    for table in TABLES:
        assert Counter(storage.name(row["uri"]) for row in rows(f"s3://labels/out/{table}")) == Counter(answered)

    letters = {storage.name(row["uri"]): row for row in rows("s3://labels/out/dead_letters")}
    assert letters.keys() == LOST.keys()
    for letter in letters.values():
        assert (letter["stage"], letter["reason"], letter["retryable"]) == ("read", "unreadable", True)
        assert f"could not be read in {TRIES} tries" in letter["detail"]
        assert letter["traceback"] is None

    assert told["injected"].keys() == {kind for kinds in KINDS.values() for kind in kinds}
    calls = Counter(told["calls"])
    assert all(TRIES <= calls.pop(f"GET /archive/in/{name}") <= TRIES * CLIENT_TRIES for name in LOST)
    written = [key for key in calls if key.startswith("PUT /labels/out/") and key.endswith(".parquet")]
    assert len(written) >= 4  # two tables of answers, recordings, dead letters
    assert all(calls[key] >= 2 for key in written)  # stored, and not known to be, and stored again
    objects = [count for key, count in calls.items() if key.endswith((".wav", ".parquet"))]
    assert max(objects) <= TRIES


@pytest.mark.parametrize("kind", ["truncated", "stall_in_body"])
def test_a_body_that_never_comes_whole_is_unreadable_for_now(server, tmp_path, monkeypatch, kind):
    server.fs.pipe_file("archive/half/a.wav", make.wav(make.sound(0.3, 16_000), 16_000))
    options = ["--share", 0, "--stall-s", 1, "--always-fail", f"GET /archive/half/a.wav={kind}"]
    with spoiled(server, tmp_path / "proxy.log", *options, patience_s=0.2) as halving:
        report = run(halving.url("archive/half"), str(tmp_path / "out"), monkeypatch)
    assert report.counts.reconciled, report.counts.problems
    (letter,) = read_table(tmp_path / "out" / "dead_letters").to_pylist()
    assert (letter["stage"], letter["reason"], letter["retryable"]) == ("read", "unreadable", True)
    assert f"could not be read in {TRIES} tries" in letter["detail"]
    assert letter["traceback"] is None
