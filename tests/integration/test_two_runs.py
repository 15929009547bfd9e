"""Two runs into one folder at the same time: each reconciles, no file is harmed, nothing is lost between them."""

import json
import subprocess
from collections import Counter

import pytest

from af3pipe import storage
from tests import fixtures_audio as make
from tests.integration.servers import S3, python_module, store_server, using
from tests.read_tables import read_table

pytestmark = pytest.mark.integration
PARTS = {"first": range(40), "second": range(20, 60)}
"""What each is asked for: twenty recordings of its own, twenty that the other is asked for too, and a broken one."""
RECORDINGS = [f"{number:03}.wav" for number in range(60)]
TABLES = ("captions", "transcripts", "recordings", "dead_letters")


@pytest.fixture(
    params=[
        pytest.param("local", marks=pytest.mark.representative),
        pytest.param(S3, marks=pytest.mark.slow),
    ]
)
def base(request, tmp_path):
    """Where the archive and the output are: a local folder, or a server."""
    if request.param == "local":
        yield str(tmp_path)
        return
    with store_server(request.param, tmp_path) as store, using(store):
        yield "s3:/"


def start(base, part):
    program = python_module("tests.integration.one_of_two_runs", base, part.start, part.stop)
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_runs_into_one_folder(base):
    for name in RECORDINGS:
        storage.write_atomic(f"{base}/archive/{name}", make.wav(make.sound(0.3, 16_000), 16_000))
    storage.write_atomic(f"{base}/archive/broken.wav", b"no audio at all")

    runs = [start(base, part) for part in PARTS.values()]
    try:
        assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
        for run in runs:  # both have all that they need: they go side by side
            run.stdin.write("go\n")
            run.stdin.flush()
        told = [json.loads(run.communicate(timeout=120)[0].splitlines()[-1]) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()

    parts = zip(told, PARTS.values(), strict=True)
    asked = {found["run_id"]: [f"{number:03}.wav" for number in part] for found, part in parts}
    assert len(asked) == 2
    assert [found["problems"] for found in told] == [[], []]
    files = storage.list_files(f"{base}/labels/out")
    assert sorted(storage.name(uri) for uri in files if "/_runs/" in uri) == sorted(f"{name}.json" for name in asked)
    assert all(uri.endswith((".json", ".parquet")) for uri in files)
    rows = {table: [] for table in TABLES}
    for uri in files:
        if uri.endswith(".parquet"):
            rows[storage.name(storage.parent(uri))] += read_table(uri).to_pylist()
    for table in ("captions", "transcripts", "recordings"):
        found = Counter((row["run_id"], storage.name(row["uri"])) for row in rows[table])
        assert max(found.values()) == 1
        broken = {"broken.wav"} if table == "recordings" else set()
        assert {name for _, name in found} == {*RECORDINGS, *broken}
        for run_id, names in asked.items():  # what only one of them was asked for is in its own rows
            alone = set(names).difference(*(others for other, others in asked.items() if other != run_id))
            assert {(run_id, name) for name in alone} <= found.keys()
    assert {row["uri"].rpartition("/")[2] for row in rows["dead_letters"]} == {"broken.wav"}
    assert {row["run_id"] for row in rows["dead_letters"]} == asked.keys()
