"""The guard of README's test command fails what takes long, and nothing else."""

import pytest

from tests import slow_guard

pytest_plugins = ["pytester"]

TESTS = """
import sys
import time
import pytest

def test_quick():
    pass

def test_that_sleeps():
    time.sleep(0.3)

@pytest.mark.slow
def test_that_may_sleep():
    time.sleep(0.3)

@pytest.mark.representative
def test_that_stands_for_its_kind():
    time.sleep(0.3)

def test_that_imports_for_all_that_follow():
    sys.modules.update({f"imported first {number}": sys for number in range(60)})
    time.sleep(0.3)

@pytest.fixture
def server():
    time.sleep(0.2)
    yield
    time.sleep(0.2)

def test_with_a_server(server):
    pass

def test_that_fails_by_itself():
    time.sleep(0.3)
    raise AssertionError("its own")
"""


@pytest.fixture
def ran(pytester, monkeypatch):
    """Runs TESTS with a limit of 0.25 s on a machine that is so many times slower than usual."""
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers =\n    slow: x\n    representative: x\n")

    def run(slowness):
        with monkeypatch.context() as patch:  # only for them: this test is watched, too
            patch.setattr(slow_guard, "LIMIT_S", 0.25)
            patch.setattr(slow_guard, "slowness", lambda: slowness)
            return pytester.inline_run("-p", "no:cacheprovider", plugins=[slow_guard])

    return run


def outcomes(done):
    return [sorted(report.nodeid.partition("::")[2] for report in some) for some in done.listoutcomes()]


def test_what_takes_long_and_is_not_marked_fails(ran):
    done = ran(slowness=1.0)
    *_, failed = outcomes(done)
    assert failed == ["test_that_fails_by_itself", "test_that_sleeps", "test_with_a_server"]
    says = {str(report.longrepr) for report in done.getfailures()}
    assert any("test_that_sleeps took 0.3 s" in text and "@pytest.mark.slow" in text for text in says)
    assert any("its own" in text for text in says)


def test_a_busy_machine_is_no_fault_of_a_test(ran):
    assert outcomes(ran(slowness=1000.0))[-1] == ["test_that_fails_by_itself"]


def test_this_machine_is_measured():
    assert slow_guard.slowness() >= 1.0
