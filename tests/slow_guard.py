"""Fails tests that take more than 3 s and are not marked, so that README's test command stays quick.

A test of more than 3 s is marked `slow`: .ci/run runs it, README's command does not. Where nothing quicker shows a
kind of behaviour, one test of that kind is marked `representative` instead, and run by both.

What counts is the test and what it sets up first: a server, a model, a process. A machine that is slow, or busy with
other work, is no fault of the test: the limit grows by as much as a fixed piece of work takes longer than on the
machine where this was written. Where clearly more processes want to run than there are cores, no test fails: how long
it would take by itself cannot be known then.
"""

import math
import os
import statistics
import sys
import time
from pathlib import Path

import pytest

LIMIT_S = 3.0
_MAY_BE_LONG = ("slow", "representative")
_STEPS = 4_000_000
_USUAL_S = 0.25  # for so many steps: Python 3.11 on one of two AMD EPYC cores that run tests, November 2026
_OVERLOADED = 1.4  # processes a core; tests that run side by side, one a core, and what they start make 1 to 1.3
_MANY_MODULES = 50

_taken_s = pytest.StashKey[float]()
_modules = pytest.StashKey[int]()
_failed = pytest.StashKey[bool]()


def slowness() -> float:
    """Returns how many times as long as usual this machine takes for its work now: at least 1, or infinity."""
    if max(os.getloadavg()[0], _running_now()) > _OVERLOADED * (os.cpu_count() or 1):
        return math.inf
    began = time.perf_counter()
    total = 0
    for step in range(_STEPS):
        total += step & 7
    return max(1.0, (time.perf_counter() - began) / _USUAL_S)


def _running_now() -> float:
    """Returns how many processes want to run; the load average takes a minute to see that."""
    counts = []
    for _ in range(11):
        time.sleep(0.01)
        running, _, _ = Path("/proc/loadavg").read_text().split()[3].partition("/")
        counts.append(int(running))
    return statistics.median(counts)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Notes what was imported before the test."""
    item.stash[_modules] = len(sys.modules)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fails the phase of a test (setup, call, teardown) in which it goes over the limit."""
    report = yield
    item.stash[_taken_s] = taken_s = item.stash.get(_taken_s, 0.0) + call.duration
    if taken_s > LIMIT_S and report.passed and _is_judged(item) and taken_s > (limit_s := LIMIT_S * slowness()):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {taken_s:.1f} s. A test of more than {LIMIT_S:.0f} s ({limit_s:.1f} s while the "
            "machine is as busy as now) is marked slow: @pytest.mark.slow. If it can be made quick, do that instead."
        )
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


def _is_judged(item):
    if item.stash.get(_failed, False) or any(map(item.get_closest_marker, _MAY_BE_LONG)):
        return False
    # The first test of a process that needs torch or Beam imports it for all that follow.
    return len(sys.modules) - item.stash[_modules] < _MANY_MODULES
