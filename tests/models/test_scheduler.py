import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from af3pipe.models import EngineFailed, caption
from af3pipe.models.scheduler import Job, JobQueue, capacity_class, isolate
from af3pipe.schemas import Reply, Request, Turn
from tests.models.conftest import somebody_waits_for
from tests.waiting import wait_until

ANY = "any"


def job(seconds=1.0, tasks=1, capacity=0):
    made = Job(Request(np.zeros(1, np.float32), (caption(),) * tasks), seconds)
    made.capacity = capacity
    return made


def take(queue, capacity=ANY):
    return queue.take(lambda job: capacity in (ANY, job.capacity), wait=False)


@given(st.integers(1, 200_000))
def test_a_capacity_holds_the_prompt_and_is_at_most_twice_as_long(positions):
    capacity = capacity_class(positions)
    assert positions <= capacity
    assert capacity < 2 * positions or capacity == 640
    assert capacity_class(capacity) == capacity


def test_callers_take_turns_and_each_is_served_in_order():
    queue = JobQueue(100, 100)
    jobs = {caller: [job() for _ in range(n)] for caller, n in ((1, 4), (2, 2), (3, 1))}
    for caller, each in jobs.items():
        for one in each:
            queue.put(one, caller)
    expected = [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (1, 2), (1, 3)]
    assert [take(queue) for _ in expected] == [jobs[caller][place] for caller, place in expected]
    assert take(queue) is None
    assert len(queue) == 0


def test_a_caller_that_comes_later_does_not_wait_for_all_that_are_there():
    queue = JobQueue(100, 100)
    early = [job() for _ in range(10)]
    for each in early:
        queue.put(each, 1)
    assert take(queue) is early[0]
    late = job()
    queue.put(late, 2)
    assert [take(queue), take(queue)] == [early[1], late]


def test_many_cancelled_ones_are_passed_over():
    queue = JobQueue(10_000, 10_000)
    for _ in range(2000):
        cancelled = job()
        queue.put(cancelled, 1)
        cancelled.future.cancel()
    last = job()
    queue.put(last, 1)
    assert take(queue) is last
    assert len(queue) == 0


def test_who_fits_passes_who_does_not_but_not_for_ever():
    queue = JobQueue(1000, 1000)
    large = job(capacity=2)
    queue.put(large, 1)
    for _ in range(200):
        queue.put(job(capacity=1), random.choice([1, 2]))
    passed = 0
    while take(queue, 1):
        passed += 1
    assert 0 < passed <= 65
    assert take(queue, 2) is large
    assert take(queue, 1) is not None


@pytest.mark.parametrize(("seconds", "waiting"), [(1.0, 4), (25.0, 4), (50.0, 2), (300.0, 1)])
def test_put_blocks_while_this_caller_has_enough_waiting(seconds, waiting):
    queue = JobQueue(4, 100)
    done = []

    def feed():
        for index in range(waiting + 1):
            queue.put(job(seconds))
            done.append(index)

    thread = threading.Thread(target=feed)
    thread.start()
    wait_until(lambda: somebody_waits_for(queue._changed))
    assert len(done) == waiting
    queue.put(job(seconds))  # another caller
    take(queue)
    thread.join(60)
    assert not thread.is_alive()


def test_a_cancelled_job_is_not_taken():
    queue = JobQueue(10, 100)
    first, second = job(), job()
    queue.put(first)
    queue.put(second)
    assert first.future.cancel()
    assert take(queue) is second
    assert second.future.running()
    assert take(queue) is None


def test_close_frees_those_who_wait_to_put_and_fails_what_waits():
    queue = JobQueue(2, 100)
    waiting, caught = [job(), job()], []
    for each in waiting:
        queue.put(each, 1)

    def put_one_more():
        with pytest.raises(EngineFailed) as error:
            queue.put(job(), 1)
        caught.append(str(error.value))

    thread = threading.Thread(target=put_one_more)
    thread.start()
    wait_until(lambda: somebody_waits_for(queue._changed))
    assert waiting[1].future.cancel()
    queue.close(EngineFailed("first"))
    queue.close(EngineFailed("second"))
    thread.join(60)
    assert caught == ["first"]
    assert str(waiting[0].future.exception(timeout=0)) == "first"
    with pytest.raises(EngineFailed, match="first"):
        take(queue)


def test_idle_time_counts_from_the_first_job_on_and_once():
    queue = JobQueue(1, 1)

    def put_when_one_has_waited():
        wait_until(lambda: somebody_waits_for(queue._changed))
        time.sleep(0.05)
        queue.put(job())

    def take_what_comes():
        putting = threading.Thread(target=put_when_one_has_waited)
        putting.start()
        queue.take(lambda job: True, wait=True)
        putting.join(60)

    take_what_comes()
    assert queue.take_idle_s() == 0, "nothing was to be done yet"
    take_what_comes()
    assert queue.take_idle_s() >= 0.04
    assert queue.take_idle_s() == 0


def test_a_turn_is_ready_when_the_replies_before_it_are_there():
    first = caption(prompt="a")
    second = first._replace(prompt="b", history=first.turns)
    third = first._replace(prompt="c", history=second.turns)
    other = first._replace(prompt="d", history=first.turns)
    asked = Job(Request(np.zeros(1, np.float32), (first, second, third, other)), 1)
    replies = [Reply(str(i), (i,), "stop", 1, 2) for i in range(4)]
    assert asked.begin_ready() == [0]
    assert asked.begin_ready() == []
    asked.reply(0, replies[0])
    assert asked.begin_ready() == [1, 3]
    asked.reply(1, replies[1])
    assert asked.begin_ready() == [2]
    assert asked.history(2) == replies[:2]
    asked.reply(3, replies[3])
    asked.reply(2, replies[2])
    assert asked.future.result(timeout=0) == replies


def test_a_turn_that_nobody_asks_is_an_error():
    follows = caption(prompt="b")._replace(history=(Turn("a"),))
    with pytest.raises(ValueError, match="follows the turn 'a', which is not an earlier task"):
        Job(Request(np.zeros(1, np.float32), (follows, caption(prompt="a"))), 1).begin_ready()


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
