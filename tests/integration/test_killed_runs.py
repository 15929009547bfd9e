"""A run that is killed at any point is completed by the next, and no row is there twice."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from tests import fixtures_audio as make
from tests.integration.runners import rows
from tests.read_tables import read_table

pytestmark = pytest.mark.integration
KILLED = -signal.SIGKILL
ROUNDS, KILLS = 10, 5
LEAVES_OUT = (
    "run_id",
    "created_at",
    "terminal_state",
    "answers",
    "kept_answers",
    "dead_letters",
    "kept_dead_letters",
)


@pytest.fixture
def archive(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.wav").write_bytes(make.wav(make.sound(0.2 + number / 10, 16000), 16000))
    (folder / "long.wav").write_bytes(make.wav(np.zeros((16000 * 650, 1), np.float32) + 0.1, 16000))
    (folder / "broken.wav").write_text("no audio")
    (folder / "list.jsonl").write_text('{"uri": "0.wav", "id": "again"}\n{"uri": "missing.wav"}\nno json\n')
    return folder


def run_killed(tmp_path, job, kills):
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "kills.json").write_text(json.dumps(kills))
    command = [sys.executable, "-m", "tests.integration.killed_run", "job.json", "kills.json"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def latest_recordings(output):
    table = read_table(output / "recordings").to_pylist()
    newest = {row["recording_id"]: row for row in sorted(table, key=lambda row: (row["created_at"], row["run_id"]))}
    kept = [{key: value for key, value in row.items() if key not in LEAVES_OUT} for row in newest.values()]
    return sorted(kept, key=str)


@pytest.mark.slow
def test_fifty_kills(archive, tmp_path):
    job = {
        "inputs": [str(archive), str(archive / "list.jsonl")],
        "output": str(tmp_path),
        "model": "demo",
        "tasks": ["caption", "transcript"],
        "questions": ["Is there speech in the audio?"],
        "over_length": "split",
        "chunk_recordings": 4,
        "decode_guard": False,
        "device": "cpu",
    }
    (undisturbed,) = run_killed(tmp_path, job, [{"output": "undisturbed"}])
    assert undisturbed["status"] == 0
    assert undisturbed["states"] == {"ok": 11, "dead_letter": 3}
    assert undisturbed["steps"] > 30
    draw = random.Random(6)
    kills = []
    for number in range(ROUNDS):
        # Rather early than late: there is less to do each time.
        places = [{"step": int(undisturbed["steps"] * draw.random() ** 2)} for _ in range(KILLS - 2)]
        places += [{"after_s": draw.uniform(0.05, 0.6)} for _ in range(2)]
        draw.shuffle(places)
        kills += [place | {"output": f"round-{number}"} for place in places] + [{"output": f"round-{number}"}]
    found = run_killed(tmp_path, job, kills)
    killed = [one for one in found if one["status"] == KILLED]
    # A run that has less to do than the first may be over before its step is reached.
    assert len(killed) > ROUNDS * KILLS / 2
    assert {one["status"] for one in found} == {0, KILLED}
    for number in range(ROUNDS):
        output = tmp_path / f"round-{number}"
        for table in ("captions", "transcripts", "answers", "dead_letters"):
            assert rows(output, table) == rows(tmp_path / "undisturbed", table), (table, number)
        assert latest_recordings(output) == latest_recordings(tmp_path / "undisturbed")
        by_run = Counter((row["recording_id"], row["run_id"]) for row in rows(output, "recordings", without=()))
        assert set(by_run.values()) == {1}
