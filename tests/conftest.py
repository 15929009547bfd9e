import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test may reach a hub

import hypothesis
import pytest

# No deadline: it would be a timed assertion. CI tries the same examples each time; new ones are looked for elsewhere.
hypothesis.settings.register_profile(
    "af3pipe", deadline=None, derandomize=bool(os.environ.get("AF3PIPE_REQUIRE_ALL"))
)
hypothesis.settings.load_profile("af3pipe")


@pytest.fixture
def no_pubsub(monkeypatch):
    """Has Pub/Sub where nothing listens."""
    from af3pipe.transforms.pubsub import subscriber
    from tests.integration.servers import free_port

    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", f"localhost:{free_port()}")
    subscriber.cache_clear()
    yield
    subscriber.cache_clear()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI nothing may be missing: a skip there is a failure, but for what needs a GPU."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("AF3PIPE_REQUIRE_ALL") and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but AF3PIPE_REQUIRE_ALL is set: {report.longrepr}"
