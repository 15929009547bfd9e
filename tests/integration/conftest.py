import json
import os
import shutil
from importlib import resources

import pytest

from tests.integration import flink

# Not everywhere can it be fetched: in CI its tests are then left out; elsewhere they skip, and say why.
collect_ignore = ["test_flink.py"] if os.environ.get("AF3PIPE_REQUIRE_ALL") and flink.missing() else []


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The demo checkpoint with a cap of 60 s instead of 600, so that a long recording is soon made."""
    folder = tmp_path_factory.mktemp("model")
    with resources.as_file(resources.files("af3pipe.demo") / "checkpoint") as checkpoint:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_audio_len": 60}))
    return folder
