"""Commands that read Parquet end with their exit code, however late Arrow's threads are.

A thread of Arrow's that lets go of a Python file while the interpreter shuts down aborts the process, after all work
is done: af3pipe/storage/parquet.py says more. Usually that is a matter of luck: here such threads are made late, and
counted.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.integration import late_arrow
from tests.outputs import FIRST, SECOND, write_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """Runs a Python program with late threads; returns its exit code and how many there were."""
    if why := late_arrow.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("late")
    library, log = late_arrow.build(folder), folder / "log"

    def run(*arguments):
        log.unlink(missing_ok=True)
        preloaded = {"LD_PRELOAD": str(library), "LATE_ARROW_LOG": str(log), "LATE_ARROW_US": "20000"}
        done = subprocess.run([sys.executable, *map(str, arguments)], env=os.environ | preloaded, capture_output=True)
        return done.returncode, len(log.read_text().splitlines()) if log.exists() else 0

    return run


READ_WITH_THREADS = """
import io, pyarrow as pa, pyarrow.parquet as pq
file = io.BytesIO()
pq.write_table(pa.table({f"column {n}": range(1000) for n in range(8)}), file)
file.seek(0)
print(pq.read_table(file).num_rows)
"""


def test_threads_of_arrow_are_seen(late):
    assert late("-c", READ_WITH_THREADS)[1] > 0


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output") / "out"
    write_run(folder, FIRST, range(20), broken=range(20, 24))
    write_run(folder, SECOND, range(5, 22), version="new model", later_s=60)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("audit", marks=pytest.mark.representative),
        pytest.param("export", marks=pytest.mark.slow),
        pytest.param("compact", marks=pytest.mark.slow),
    ],
)
def test_commands_on_an_output(late, output, tmp_path, command):
    shutil.copytree(output, tmp_path / "out")
    more = [tmp_path / "clean"] if command == "export" else []
    assert late("-m", "af3pipe", command, tmp_path / "out", *more) == (0, 0)


READ_INPUTS = """
import fsspec, pyarrow as pa, pyarrow.parquet as pq
from af3pipe import storage
from af3pipe.transforms.inputs.read import list_recordings

store = fsspec.filesystem("memory")
audio = [{"bytes": bytes([n]) * 70_000, "path": f"{n}.wav"} for n in range(40)]
columns = {f"column {n}": [f"{n} {row}" for row in range(40)] for n in range(8)}
with store.open("/manifest.parquet", "wb") as file:
    pq.write_table(pa.table(columns | {"uri": [f"memory://{n}.wav" for n in range(40)]}), file)
held = pa.table(columns | {"audio": audio})
with store.open("/audio.parquet", "wb") as file:
    pq.write_table(held, file, row_group_size=10)
for name, compression in (("plain", None), ("packed", "zstd")):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with store.open(f"/{name}.arrow", "wb") as file, pa.ipc.new_stream(file, held.schema, options=options) as writer:
        writer.write_table(held)
for name in ("manifest.parquet", "audio.parquet", "plain.arrow", "packed.arrow"):
    found = list(list_recordings(f"memory://{name}"))
    assert len(found) == (1 if name == "packed.arrow" else 40), found
    if name in ("audio.parquet", "plain.arrow"):
        assert [storage.read_bytes(one.uri) for one in found] == [cell["bytes"] for cell in audio]
"""


def test_inputs(late):
    assert late("-c", READ_INPUTS) == (0, 0)


@pytest.mark.slow
def test_demo(late, tmp_path):
    assert late("-m", "af3pipe", "demo", "--output", tmp_path / "out") == (0, 0)
    # Again into the same output: what earlier runs have written is read first.
    assert late("-m", "af3pipe", "demo", "--output", tmp_path / "out") == (0, 0)
