"""Workers that differ from the launcher, and the processes that workers leave: a real job service and worker pool."""

import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

import af3pipe
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from tests import fixtures_audio as make
from tests.integration.runners import portable_runner, rows

pytestmark = [pytest.mark.integration, pytest.mark.slow]
PACKAGE = Path(af3pipe.__file__).parent


@pytest.fixture
def values(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / "in" / f"{n}.wav").write_bytes(make.wav(make.sound(1, 16000), 16000))
    output = str(tmp_path / "out")
    return {"inputs": str(tmp_path / "in"), "output": output, "model": "demo", "max_new_tokens": 8, "device": "cpu"}


@pytest.fixture
def elsewhere(tmp_path):
    """A current folder for workers, with nothing of ours in it."""
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def failure(values, tmp_path, **pool):
    with portable_runner(tmp_path, **pool) as flags, pytest.raises(batch.RunFailed) as error:
        batch.run(make_job(values), flags)
    return str(error.value)


def test_a_worker_with_another_version(values, tmp_path, elsewhere):
    shutil.copytree(PACKAGE, elsewhere / "af3pipe")
    (elsewhere / "af3pipe" / "__init__.py").write_text('__version__ = "9.9.9"')
    for path in (elsewhere / "af3pipe" / "transforms").glob("*.py"):  # so that what is sent cannot be unpickled
        path.write_text(path.read_text().replace("AnswerDoFn", "AnsweringDoFn"))
    told = failure(values, tmp_path, workers={"PYTHONPATH": str(elsewhere)}, workers_folder=elsewhere)
    host = socket.gethostname()
    assert told.startswith(f"worker {host} has another version than the launcher {host}: af3pipe 9.9.9 (launcher: ")
    assert f"(launcher: {af3pipe.__version__}). Install the same version on both" in told
    assert "\n" not in told
    assert rows(tmp_path / "out", "captions") == []


def test_a_worker_with_nothing_of_ours(values, tmp_path, elsewhere):
    (elsewhere / "af3pipe").mkdir()
    missing = "No module named 'af3pipe'"  # which may well be installed where these tests run
    (elsewhere / "af3pipe" / "__init__.py").write_text(f'raise ModuleNotFoundError("{missing}", name="af3pipe")')
    told = failure(values, tmp_path, workers={"PYTHONPATH": str(elsewhere)}, workers_folder=elsewhere)
    assert told.startswith("a worker cannot unpickle the job that it was sent (ModuleNotFoundError: No module named")
    assert f"af3pipe {af3pipe.__version__} with its dependencies, Apache Beam 2." in told
    assert "\n" not in told


def test_a_worker_without_the_model(values, tmp_path, elsewhere, monkeypatch):
    shutil.copytree(PACKAGE / "demo" / "checkpoint", tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    pool = {"workers": {"PYTHONPATH": str(PACKAGE.parent)}, "workers_folder": elsewhere}
    told = failure(values | {"model": "./models/mine"}, tmp_path, **pool)
    assert told.startswith(f"worker {socket.gethostname()}: ")
    assert "models/mine" in told
    assert "must be on every worker: in its image, or mounted, at this same absolute path; or name a hub id" in told
    assert "\n" not in told


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_leave_no_process_behind(values, tmp_path):
    mark = f"workers-of-{tmp_path.name}-{os.getpid()}"
    with portable_runner(tmp_path, workers={"AF3PIPE_TEST_MARK": mark}) as flags:
        report = batch.run(make_job(values), flags)
        assert report.counts.reconciled
        deadline = time.monotonic() + 60
        while len(left := processes(mark)) > 1 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert [re.search(r"worker_pool_main", line) is not None for line in left] == [True], left
    assert processes(mark) == []


def processes(mark):
    """Command lines of the running processes that have it in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended meanwhile, or is somebody else's
            continue
    return found
