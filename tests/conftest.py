import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test may reach a hub

import pytest


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
