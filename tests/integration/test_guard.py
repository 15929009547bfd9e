"""What happens to a run whose decoder processes die and hang under it."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from af3pipe.models.engine import ENGINES
from af3pipe.pipelines import batch
from af3pipe.pipelines.job import make_job
from benchmarks import constant_engine
from tests import fixtures_audio as make
from tests.integration.runners import rows

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def decoder_processes(at_work_s=0.0):
    """Our own children that decode, by pid, if they have worked for so long; starting takes some 0.3 s."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            told = (folder / "stat").read_text().rpartition(")")[2].split()
            worked_s = (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")
            is_ours = told[1] == str(os.getpid()) and "af3pipe.audio.guarded" in (folder / "cmdline").read_text()
            if is_ours and worked_s >= at_work_s:
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue
    return found


class Attacker(threading.Thread):
    """Sends signals to decoder processes that have been at work for a while, one after the other."""

    def __init__(self, signals):
        super().__init__(daemon=True)
        self.signals, self.sent, self.done = signals, 0, threading.Event()

    def run(self):
        attacked = set()
        while not self.done.wait(0.2) and self.sent < len(self.signals):
            for pid in set(decoder_processes(at_work_s=0.6)) - attacked:
                os.kill(pid, self.signals[self.sent])
                attacked.add(pid)
                self.sent += 1
                break

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()


def test_processes_that_are_killed_and_frozen_cost_a_recording_each_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(constant_engine, "window_s", 0.0)
    monkeypatch.setitem(ENGINES, "constant", "")  # not for the tests after this one
    folder = tmp_path / "in"
    folder.mkdir()
    data = make.mp3(make.sound(60, 44100, 2), 44100)
    for number in range(60):
        (folder / f"{number:02}.mp3").write_bytes(data)
    job = make_job(
        {
            "inputs": [str(folder)],
            "output": str(tmp_path / "out"),
            "model": "demo",
            "engine": constant_engine.register(),
            "decode_timeout_s": 1.0,
        }
    )
    with Attacker([signal.SIGSEGV, signal.SIGSTOP, signal.SIGKILL] * 2) as attacker:
        report = batch.run(job)

    assert attacker.sent >= 3
    letters = rows(tmp_path / "out", "dead_letters")
    assert sum(report.counts.states.values()) == 60
    assert report.counts.states["ok"] == 60 - len(letters)
    assert report.counts.found == 60
    assert len(letters) < attacker.sent  # what was decoded again in a new process is ok
    assert {letter["reason"] for letter in letters} <= {"decoder_crashed", "decode_timeout"}
    assert all(letter["retryable"] and letter["traceback"] is None for letter in letters)
    assert len({json.loads(letter["input"])["recording"]["uri"] for letter in letters}) == len(letters)

    deadline = time.monotonic() + 10
    while decoder_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert decoder_processes() == []
