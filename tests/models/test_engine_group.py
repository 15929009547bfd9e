"""Several engine processes as one engine: equal replies, nobody waits for ever, and no process is left."""

import os
import signal
import subprocess
import sys
import threading

import apache_beam as beam
import pytest
from apache_beam.testing.util import assert_that, equal_to

from af3pipe.audio.levels import measure
from af3pipe.models import (
    EngineFailed,
    EngineOptions,
    ModelError,
    acquire_engine,
    caption,
    open_engine,
    release_engine,
    resolve,
)
from af3pipe.models.engine_group import EngineGroup
from af3pipe.schemas import AudioInfo, Decoding, Reason, Recording, Rejected, Request, Segment, Stage, Task
from af3pipe.transforms import AskAudioFlamingo
from af3pipe.transforms.ask import Asker
from tests.models.conftest import sounds
from tests.waiting import wait_until

pytestmark = pytest.mark.integration
CAPTION = resolve(caption(max_new_tokens=6), "AudioFlamingo3")
LONG = CAPTION._replace(decoding=Decoding(max_new_tokens=600, min_new_tokens=600))
SLOTS = 2


def options(model, **changes):
    return EngineOptions(str(model), device="cpu,cpu", slots=SLOTS)._replace(**changes)


def is_running(pid):
    """Not as a zombie either."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def own_engine_processes():
    listed = subprocess.run(["ps", "-A", "-o", "ppid=,command="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=1) for line in listed.splitlines()]
    return [line for line in lines if line[0] == str(os.getpid()) and "engine_process" in line[1]]


def engine_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("af3pipe-engine-")]


@pytest.fixture(scope="module")
def group(tiny_af3):
    opened = []
    thread = threading.Thread(target=lambda: opened.append(acquire_engine(options(tiny_af3))))
    thread.start()
    thread.join()  # the processes must not end with it, as they would on Linux had it started them itself
    yield opened[0]
    release_engine(options(tiny_af3))
    assert own_engine_processes() == engine_threads() == []


@pytest.fixture(scope="module")
def single(tiny_af3):
    engine = open_engine(options(tiny_af3, device="cpu"))
    yield engine
    engine.close()


@pytest.mark.representative
def test_replies_equal_those_of_one_engine_and_work_is_told_once(group, single):
    group.take_stats()
    requests = [
        Request(sounds(0.5 + (7 * i % 5), seed=i), (CAPTION, CAPTION._replace(prompt=f"Question {i}?"))[: 1 + i % 2])
        for i in range(12)
    ]
    futures = [group.submit(request) for request in requests]
    expected = [single.submit(request) for request in requests]
    for future, alone in zip(futures, expected, strict=True):
        assert future.result(timeout=60) == alone.result(timeout=60)
    assert len({tuple(future.result()) for future in futures}) > 6, "equal replies to all would prove nothing"
    told, alone = group.take_stats(), single.take_stats()
    for name in ("requests", "windows", "audio_tokens", "prompt_tokens", "new_tokens"):
        assert getattr(told, name) == getattr(alone, name) > 0
    assert group.take_stats() == type(told)()


def test_it_says_what_it_is(group, single):
    assert isinstance(group, EngineGroup)
    assert group.info == single.info._replace(device="cpu,cpu", slots=2 * SLOTS)
    assert group.is_open
    assert len(set(group.pids)) == 2
    assert os.getpid() not in group.pids


def test_asking_alone_passes_through(group):
    request = Request(sounds(3), (CAPTION,))
    assert group.ask_alone(request).result(timeout=60) == group.submit(request).result(timeout=60)


def test_requests_that_fail_do_so_alone_and_with_what_they_failed_of(group, single):
    futures = [
        group.submit(Request(sounds(0.02), (CAPTION,))),
        group.submit(Request(sounds(1), (Task("caption"),))),
        group.submit(Request(sounds(1), (CAPTION,))),
    ]
    with pytest.raises(Rejected) as caught:
        futures[0].result(timeout=60)
    with pytest.raises(Rejected) as expected:
        single.submit(Request(sounds(0.02), (CAPTION,))).result(timeout=60)
    assert (caught.value.stage, caught.value.reason) == (Stage.WINDOW, Reason.TOO_SHORT)
    assert caught.value.detail == expected.value.detail
    with pytest.raises(ValueError, match="no prompt") as unexpected:
        futures[1].result(timeout=60)
    assert "transformers_engine.py" in str(unexpected.value.__cause__), "the dead letter's traceback shows where"
    assert futures[2].result(timeout=60)
    with pytest.raises(TypeError, match="pickle"):
        group.submit(Request(sounds(1), (CAPTION._replace(name=threading.Lock()),)))
    assert group.is_open


def test_both_processes_work_and_cancelled_requests_are_not_worked_on(group):
    group.take_stats()
    busy = []
    for i in range(2 * SLOTS):
        # One that has not accepted its last request yet is passed over, whatever it has.
        wait_until(lambda: all(member.accepts for member in group._members))
        busy.append(group.submit(Request(sounds(1, seed=i), (LONG,))))
    assert [len(member.asked) for member in group._members] == [SLOTS, SLOTS], "the least audio comes first"
    waiting = [group.submit(Request(sounds(1, seed=i), (LONG,))) for i in range(6)]
    assert all(future.cancel() for future in waiting)
    assert len([future.result(timeout=120) for future in busy]) == 2 * SLOTS
    wait_until(lambda: not any(member.asked for member in group._members))
    assert group.take_stats().requests == 2 * SLOTS


def test_submit_blocks_while_the_queues_of_all_are_full(group):
    futures, unanswered = [], []
    enough = threading.Event()

    def feed():
        while not enough.is_set():
            futures.append(group.submit(Request(sounds(1), (LONG,))))
            unanswered.append(sum(not future.done() for future in futures))

    feeder = threading.Thread(target=feed)
    feeder.start()
    # Of each engine: its slots, its queue, which is twice as long, and one that waits for room there.
    most = 2 * (SLOTS + 2 * SLOTS + 1)
    # It submits all along: when the first replies are there, it has long had the time to submit too many.
    wait_until(lambda: futures and futures[0].done())
    enough.set()
    assert most - 2 <= max(unanswered) <= most
    for future in list(futures):
        future.cancel()
    feeder.join(60)
    assert not feeder.is_alive()
    futures[-1].cancel()


@pytest.mark.slow
def test_a_process_that_is_killed_fails_what_it_has_and_is_replaced_for_the_next_try(tiny_af3):
    key = options(tiny_af3, slots=SLOTS + 1)  # another than the other tests hold
    lost = acquire_engine(key)
    assert acquire_engine(key) is lost
    busy = [lost.submit(Request(sounds(1, seed=i), (LONG,))) for i in range(2)]
    assert all(len(member.asked) == 1 for member in lost._members)
    os.kill(lost.pids[0], signal.SIGKILL)
    with pytest.raises(EngineFailed, match=r"engine process on cpu died of SIGKILL.*memory"):
        busy[0].result(timeout=30)
    assert not lost.is_open
    with pytest.raises(EngineFailed, match="SIGKILL"):
        lost.submit(Request(sounds(1), (CAPTION,)))
    assert busy[1].result(timeout=120), "the other process is not to blame"
    left = lost.pids[1]
    assert is_running(left)
    replaced = acquire_engine(key)
    assert replaced is not lost
    assert not is_running(left)
    assert replaced.submit(Request(sounds(1), (CAPTION,))).result(timeout=60)
    unanswered = [replaced.submit(Request(sounds(1, seed=i), (LONG,))) for i in range(6)]
    for _ in range(3):
        release_engine(key)
    assert not any(is_running(pid) for pid in replaced.pids)
    assert all(isinstance(future.exception(timeout=0), EngineFailed) for future in unanswered)
    with pytest.raises(EngineFailed, match="closed"):
        replaced.submit(Request(sounds(1), (CAPTION,)))
    replaced.close()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_raises_what_its_process_says(tiny_af3, tmp_path):
    for file in tiny_af3.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    before = own_engine_processes()
    with pytest.raises(ModelError) as alone:
        open_engine(options(tmp_path, device="cpu"))
    with pytest.raises(ModelError) as caught:
        open_engine(options(tmp_path))
    assert str(caught.value) == str(alone.value)
    assert own_engine_processes() == before


SCRIPT = """
import sys, time
print("begun", flush=True)
from af3pipe.models import EngineOptions, caption, open_engine, resolve
from af3pipe.schemas import Request
import numpy as np
engine = open_engine(EngineOptions(sys.argv[1], device="cpu,cpu"))
task = resolve(caption(max_new_tokens=500), "AudioFlamingo3")
noise = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
engine.submit(Request(noise, (task._replace(decoding=task.decoding._replace(max_new_tokens=2)),))).result()
for _ in range(4):
    engine.submit(Request(noise, (task,)))
print(*engine.pids, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_run_once_and_leaves_no_process_when_it_is_killed(tiny_af3, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py", str(tiny_af3)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout.readline() == "begun\n"
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_running, pids))
    finally:
        process.kill()
        rest = process.communicate()[0]
    assert rest == ""
    wait_until(lambda: not any(map(is_running, pids)), seconds=30)


def test_on_a_real_runner(tiny_af3, group, single):
    segments = []
    for i in range(6):
        samples = sounds(1 + i, seed=i)
        info = AudioInfo(1.0 + i, 16000, 1, "pcm_16", "soundfile")
        recording = Recording(f"r{i}", f"{i}.wav", 1, None, "now")
        segments.append(Segment(recording, info, 0, 0.0, 1.0 + i, True, 16000, samples, measure(samples)))
    expected = [
        (segment.recording.recording_id, single.submit(Request(segment.samples, (CAPTION,))).result(60)[0].text)
        for segment in segments
    ]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        ask = AskAudioFlamingo(model=str(tiny_af3), tasks=[CAPTION], device="cpu,cpu", slots=SLOTS)
        answers = pipeline | beam.Create(segments) | ask
        found = answers.good | beam.Map(lambda row: (row.recording_id, row.text))
        assert_that(found, equal_to(expected))
        assert_that(answers.dead_letters, equal_to([]), "none")
    assert group.is_open, "it was this one, which others still hold"


def test_a_bundle_has_as_much_under_way_as_all_of_them_can_use(tiny_af3, group):
    asker = Asker(options(tiny_af3), [CAPTION])
    asker.setup()
    before = asker.most_pending
    assert asker.engine() is group
    assert asker.most_pending == (3 * 2 * SLOTS, 2 * before[1])
    asker.close()
