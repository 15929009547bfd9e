"""Hundreds of recordings by a store that spoils a tenth of all calls: nothing lost, nothing twice, tries bounded."""

import contextlib
import json
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from af3pipe import storage
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from af3pipe.storage import retry
from tests import fixtures_audio as make
from tests.integration.fault_proxy import KINDS
from tests.integration.servers import S3, free_port, python_module, serving, store_server, using
from tests.read_tables import read_table

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("engines")]
NAMES = [f"{number:03}.wav" for number in range(300)]
LOST = {"012.wav": "503", "077.wav": "reset", "123.wav": "truncated", "277.wav": "stall_in_body"}
"""Recordings that cannot be read, and what happens whenever they are."""
TABLES = ("captions", "transcripts")
TRIES, CLIENT_TRIES = 5, 2
"""Ours of a read, and the HTTP client's own, of a connection that is reset, within each of them."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with store_server(S3, tmp_path_factory.mktemp("server")) as found, using(found):
        yield found


@contextlib.contextmanager
def spoiled(server, log, *options):
    """Has s3:// mean the server behind a proxy. botocore would try again within each try of s3fs."""
    port = free_port()
    proxy = python_module("tests.integration.fault_proxy", port, server.port, *options)
    client = {"config_kwargs": {"read_timeout": 1, "retries": {"total_max_attempts": 1}}}
    with serving(proxy, port, log=log), using(server.behind(port, **client)) as found:
        yield found


def tally(store):
    with urllib.request.urlopen(f"http://127.0.0.1:{store.port}/_faults") as response:
        return json.load(response)


def run(inputs, output):
    return batch.run(
        make_job(
            {
                "inputs": [inputs],
                "output": output,
                "model": "demo",
                "tasks": ["caption", "transcript"],
                "engine": "constant",
                "decode_guard": False,
            }
        )
    )


def rows(folder):
    return read_table(folder).to_pylist()


def always_fail(folder, lost):
    """Options of the proxy: for these recordings, and for the first write of each file of a table."""
    options = ["--lose-first-answer", ".parquet"]
    for name, kind in lost.items():
        options += ["--always-fail", f"GET /archive/{folder}/{name}={kind}"]
    return options


def look_at_rows(report, output, names, lost):
    answered = set(names) - set(lost)
    assert report.counts.reconciled, report.counts.problems
    assert report.counts.states == {"ok": len(answered), "dead_letter": len(lost)}
    assert Counter(storage.name(row["uri"]) for row in rows(f"{output}/recordings")) == Counter(names)
    for table in TABLES:
        assert Counter(storage.name(row["uri"]) for row in rows(f"{output}/{table}")) == Counter(answered)
    letters = {storage.name(row["uri"]): row for row in rows(f"{output}/dead_letters")}
    assert letters.keys() == lost.keys()
    for letter in letters.values():
        assert (letter["stage"], letter["reason"], letter["retryable"]) == ("read", "unreadable", True)
        assert f"could not be read in {TRIES} tries" in letter["detail"]
        assert letter["traceback"] is None


def look_at_tries(told, folder, lost):
    """That they are bounded; how often each fault befell the recordings that it always befalls."""
    calls = Counter(told["calls"])
    tried = Counter({kind: calls.pop(f"GET /archive/{folder}/{name}") for name, kind in lost.items()})
    assert all(TRIES <= times <= TRIES * CLIENT_TRIES for times in tried.values())
    written = [key for key in calls if key.startswith("PUT /labels/") and key.endswith(".parquet")]
    assert len(written) >= 4  # two tables of answers, recordings, dead letters
    assert all(calls[key] >= 2 for key in written)  # stored, and not known to be, and stored again
    objects = [count for key, count in calls.items() if key.endswith((".wav", ".parquet"))]
    assert max(objects) <= TRIES
    return tried


def test_what_cannot_be_read_and_what_is_not_known_to_be_written(server, tmp_path, monkeypatch):
    """The same each time, by no draw: some recordings never come, and of no table's file does the writer hear."""
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.01)
    lost = {"1.wav": "503", "2.wav": "reset", "3.wav": "truncated"}
    names = [f"{number}.wav" for number in range(10)]
    for name in names:
        server.fs.pipe_file(f"archive/few/{name}", make.wav(make.sound(0.3, 16_000), 16_000))
    with spoiled(server, tmp_path / "proxy.log", "--share", 0, *always_fail("few", lost)) as faulty:
        report = run(faulty.url("archive/few"), faulty.url("labels/few"))
        told = tally(faulty)
    look_at_rows(report, "s3://labels/few", names, lost)
    look_at_tries(told, "few", lost)


@pytest.mark.slow
def test_hundreds_of_recordings_through_faults(server, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.05)
    options = ["--share", 0.1, "--seed", 1, "--stall-s", 2, "--slow-s", 0.3, *always_fail("in", LOST)]
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
        report = run(faulty.url("archive/in"), faulty.url("labels/out"))
        told = tally(faulty)

    stored = server.fs.cat(server.fs.find("archive/in"))
    assert {storage.name(path): data for path, data in stored.items()} == recordings

    look_at_rows(report, "s3://labels/out", NAMES, LOST)
    by_chance = Counter(told["injected"]) - look_at_tries(told, "in", LOST)
    assert by_chance.keys() == {kind for kinds in KINDS.values() for kind in kinds}
