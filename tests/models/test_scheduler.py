import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.models import EngineFailed, caption, scheduler
from af3pipe.models.scheduler import Job, JobQueue, isolate
from af3pipe.schemas import Reply, Request


def job(seconds=1.0, tasks=1):
    return Job(Request(np.zeros(1, np.float32), (caption(),) * tasks), seconds)


def test_a_full_batch_is_taken_at_once_and_in_order(monkeypatch):
    monkeypatch.setattr(scheduler, "_GATHER_S", 1000)  # were it to gather, it would not come back
    queue = JobQueue(4, 100)
    jobs = [job(tasks=2) for _ in range(3)]
    for each in jobs:
        queue.put(each)
    assert queue.take() == jobs[:2]
    monkeypatch.setattr(scheduler, "_GATHER_S", 0.01)
    assert queue.take() == jobs[2:]


def test_a_job_larger_than_a_batch_is_taken_alone():
    queue = JobQueue(4, 100)
    jobs = [job(), job(tasks=7), job(seconds=500)]
    for each in jobs[:2]:
        queue.put(each)
    assert [queue.take(), queue.take()] == [[jobs[0]], [jobs[1]]]
    queue.put(jobs[2])
    assert queue.take() == [jobs[2]]


@pytest.mark.parametrize(("seconds", "tasks", "waiting"), [(1.0, 1, 8), (1.0, 2, 4), (50.0, 1, 4), (300.0, 1, 1)])
def test_put_blocks_when_two_batches_wait(seconds, tasks, waiting):
    queue = JobQueue(4, 100)
    done = []

    def feed():
        for index in range(waiting + 1):
            queue.put(job(seconds, tasks))
            done.append(index)

    thread = threading.Thread(target=feed)
    thread.start()
    time.sleep(0.2)
    assert len(done) == waiting
    queue.take()
    thread.join(5)
    assert not thread.is_alive()


def test_close_frees_those_who_wait_to_put_and_fails_what_waits():
    queue = JobQueue(1, 1)
    waiting, caught = [job(), job()], []
    for each in waiting:
        queue.put(each)

    def put_one_more():
        with pytest.raises(EngineFailed) as error:
            queue.put(job())
        caught.append(str(error.value))

    thread = threading.Thread(target=put_one_more)
    thread.start()
    time.sleep(0.05)
    assert waiting[1].future.cancel()
    queue.close(EngineFailed("first"))
    queue.close(EngineFailed("second"))
    thread.join(5)
    assert caught == ["first"]
    assert str(waiting[0].future.exception(timeout=0)) == "first"
    with pytest.raises(EngineFailed, match="first"):
        queue.take()


def test_idle_time_counts_from_the_first_job_on_and_once():
    queue = JobQueue(1, 1)
    threading.Timer(0.1, lambda: queue.put(job())).start()
    queue.take()
    before_the_first = queue.take_idle_s()
    threading.Timer(0.1, lambda: queue.put(job())).start()
    queue.take()
    assert before_the_first < 0.05 < queue.take_idle_s()
    assert queue.take_idle_s() == 0


def test_waiting_for_a_batch_to_fill_is_idle_time_too():
    queue = JobQueue(4, 100)
    queue.put(job())
    queue.take()
    assert queue.take_idle_s() > 0.04


def test_a_job_is_answered_when_its_last_task_is_and_only_once():
    replies = [Reply(str(i), (i,), "stop", 1, 2) for i in range(2)]
    answered = job(tasks=2)
    answered.reply(1, replies[1])
    assert not answered.done
    answered.reply(0, replies[0])
    assert answered.future.result(timeout=0) == replies
    answered.fail(ValueError())
    failed = job()
    failed.fail(ValueError())
    failed.reply(0, replies[0])
    assert isinstance(failed.future.exception(timeout=0), ValueError)


@given(st.lists(st.booleans(), max_size=40))
def test_isolation_blames_exactly_the_guilty_and_works_on_the_rest_once(guilty):
    worked, blamed, told = [], [], []

    def work(items):
        if any(guilty[item] for item in items):
            raise ValueError(items)
        worked.extend(items)

    isolate(range(len(guilty)), work, lambda item, error: blamed.append(item), told.append)
    assert worked == [item for item, bad in enumerate(guilty) if not bad]
    assert blamed == [item for item, bad in enumerate(guilty) if bad]
    assert bool(told) == any(guilty)


def test_isolation_ends_when_everything_is_lost():
    calls = []

    def work(items):
        calls.append(items)
        raise OSError

    def lost(error):
        raise EngineFailed from error

    with pytest.raises(EngineFailed):
        isolate([1, 2], work, lambda item, error: None, lost)
    assert calls == [[1, 2]]
