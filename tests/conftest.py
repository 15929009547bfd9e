import gc
import os
import signal
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test may reach a hub
# Before torch and numpy are: tests run side by side, a process for each core, and more threads than cores are in
# each other's way. The processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Or each of the hundred Python processes that tests start would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import hypothesis
import pytest

from tests import slow_guard

# No deadline: it would be a timed assertion. CI tries the same examples each time; new ones are looked for elsewhere.
hypothesis.settings.register_profile(
    "af3pipe", deadline=None, derandomize=bool(os.environ.get("AF3PIPE_REQUIRE_ALL"))
)
hypothesis.settings.load_profile("af3pipe")


@pytest.fixture
def no_pubsub(monkeypatch):
    """Has Pub/Sub where nothing listens."""
    from af3pipe.transforms.inputs.pubsub import subscriber
    from tests.integration.servers import free_port

    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", f"localhost:{free_port()}")
    subscriber.cache_clear()
    yield
    subscriber.cache_clear()


# These begin first, so that no process is left with a long one when the other has nothing more to do.
LONGEST = ("test_flink", "test_parity", "test_flink_watch", "test_watch", "test_pubsub", "test_fuzz", "test_faults")


def pytest_configure(config):
    config.pluginmanager.register(slow_guard)
    # A shell's job in the background ignores Ctrl-C, and so would all that the tests start and interrupt.
    is_ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
    if is_ignored and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_collection_finish():
    """Takes all that is imported by now out of what is searched for garbage.

    An engine that is closed collects garbage; to search all objects of Beam, torch and transformers takes a second.
    """
    gc.freeze()


def pytest_unconfigure():
    """Else extension modules that look for leaks at exit report what was never searched."""
    gc.unfreeze()


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
