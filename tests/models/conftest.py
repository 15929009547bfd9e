import importlib.resources
from pathlib import Path

import numpy as np
import pytest
import soundfile

from af3pipe.models import EngineOptions
from af3pipe.models.oracle import Oracle
from benchmarks.contenders import Loaded, open_ours
from tests.checkpoints import tiny_audio_flamingo, tiny_music_flamingo

RATE = 16_000
ORACLES = {"demo": "demo_oracle", "af3": "af3_oracle", "mf": "mf_oracle"}  # by the names of their checkpoints


def somebody_waits_for(condition):
    """Whether a thread is blocked in this threading.Condition."""
    with condition:
        return bool(condition._waiters)


def clip(name):
    samples, rate = soundfile.read(
        str(importlib.resources.files("af3pipe.demo") / "clips" / f"{name}.flac"), dtype="float32"
    )
    assert (rate, samples.ndim) == (RATE, 1), f"{name} is a clip with tricks; take a plain one"
    return samples


def sounds(seconds, seed=0):
    """A mixture of chirps and noise of this length, different for every seed and in every window."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    tones = sum(
        np.sin(2 * np.pi * (f + 20 * rng.random() * t) * t) * (np.sin(t * rng.random() * 4) > 0)
        for f in rng.uniform(150, 2500, 3)
    )
    return (0.15 * tones + rng.standard_normal(len(t)) * 0.03).astype(np.float32)


@pytest.fixture(scope="session")
def tiny_af3(tmp_path_factory) -> Path:
    return tiny_audio_flamingo(tmp_path_factory.mktemp("checkpoints") / "af3")


@pytest.fixture(scope="session")
def tiny_mf(tmp_path_factory) -> Path:
    return tiny_music_flamingo(tmp_path_factory.mktemp("checkpoints") / "mf", max_audio_len=1200)


@pytest.fixture(scope="session")
def demo_oracle():
    return Oracle.load("demo")


@pytest.fixture(scope="session")
def af3_oracle(tiny_af3):
    return Oracle.load(str(tiny_af3))


@pytest.fixture(scope="session")
def mf_oracle(tiny_mf):
    return Oracle.load(str(tiny_mf))


@pytest.fixture
def open_model(request):
    """Opens engines that are closed when the test ends; on the CPU, where the oracle is, but for tests of a GPU.

    On the CPU their weights are those that the oracle of the same checkpoint has loaded, where it has one.
    """
    engines = []
    device = "cuda" if request.node.get_closest_marker("gpu") else "cpu"

    def open_(model, **changes):
        options = EngineOptions(str(model), **({"device": device} | changes))
        loaded = None
        if options.device == "cpu" and (name := ORACLES.get(Path(model).name)):
            oracle = request.getfixturevalue(name)
            loaded = Loaded(oracle.model, oracle.processor)
        engines.append(open_ours(options, loaded))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()
