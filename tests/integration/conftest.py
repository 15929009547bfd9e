import json
import os
import shutil
from importlib import resources

import pytest

from af3pipe.models import ENGINES
from benchmarks import constant_engine
from tests.integration import flink, late_arrow, pubsub
from tests.integration.runners import portable_runner

# Not everywhere can they be fetched: in CI their tests are then left out; elsewhere they skip, and say why.
_MISSING = {
    "test_exit.py": late_arrow.missing(),
    "test_flink.py": flink.missing(),
    "test_flink_watch.py": flink.missing(),
    "test_pubsub.py": pubsub.is_missing(),
    "test_watch.py": not shutil.which("prism"),
    "test_watch_messages.py": pubsub.is_missing(),
}
collect_ignore = [name for name, missing in _MISSING.items() if missing and os.environ.get("AF3PIPE_REQUIRE_ALL")]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The demo checkpoint with a cap of 60 s instead of 600, so that a long recording is soon made."""
    folder = tmp_path_factory.mktemp("model")
    with resources.as_file(resources.files("af3pipe.demo") / "checkpoint") as checkpoint:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_audio_len": 60}))
    return folder


@pytest.fixture(scope="module")
def engines():
    """Engines by name for runs in this process in which the model is not the subject, all without a wait.

    `constant` says the same of everything, `echo` what it heard, and `closed` cannot be opened.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "constant", "benchmarks.constant_engine:ConstantEngine")
        patch.setitem(ENGINES, "echo", "tests.echo_engine:EchoEngine")
        patch.setitem(ENGINES, "closed", "tests.closed_engine:ClosedEngine")
        patch.setattr(constant_engine, "window_s", 0.0)
        yield


@pytest.fixture(scope="session")
def job_service(tmp_path_factory):
    """Flags for a job service and a pool of workers with this process's environment and current folder.

    For jobs one after the other: a worker ends with its job.
    """
    with portable_runner(tmp_path_factory.mktemp("job_service")) as flags:
        yield flags
