import json
import os
import shutil
from importlib import resources

import pytest

from tests.integration import flink, pubsub

# Not everywhere can they be fetched: in CI their tests are then left out; elsewhere they skip, and say why.
_MISSING = {
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
