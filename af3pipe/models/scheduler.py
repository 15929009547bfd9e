"""Queues requests fairly among callers, and confines each failure to the request that causes it. Imports no torch."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from af3pipe.models.engine import EngineFailed
from af3pipe.schemas import Reply, Request

T = TypeVar("T")

# A clip of 15 s, or a window of 30 s (750 tokens), with its prompt and a reply of some hundred tokens: the two
# kinds that archives are full of. From there on doubled.
_SMALLEST_CAPACITIES = (640, 1280)
_MOST_PASSES = 64  # how often others may go before a request whose slot is not free


def capacity_class(positions: int) -> int:
    """Returns the length of the slots for a prompt with this many tokens, its reply included.

    There are few lengths, so that many prompts share the slots of one; none is more than twice as long as needed.
    """
    capacity = _SMALLEST_CAPACITIES[0]
    while capacity < positions:
        capacity *= 2
    return capacity


class Job:
    """A request, its future, and its replies so far.

    Attributes:
        seconds: Duration of its audio.
        audio_tokens: Audio tokens of each of its audios; the engine fills in this and the next.
        capacity: Length of the slots for its prompts.
        alone: Whether unmodified `generate` processes it, without a slot.
        number: Position in the order of arrival.
        passed: Number of later jobs that overtook it.
    """

    def __init__(self, request: Request, seconds: float, *, alone: bool = False) -> None:
        self.request = request
        self.seconds = seconds
        self.alone = alone
        self.audio_tokens: list[int] = []
        self.capacity = 0
        self.number = 0
        self.passed = 0
        self.future: Future[list[Reply]] = Future()
        self._replies: dict[int, Reply] = {}
        self._begun: set[int] = set()

    @property
    def done(self) -> bool:
        """Whether it is answered or has failed, so that nothing more needs to be done for it."""
        return self.future.done()

    def begin_ready(self) -> list[int]:
        """Returns the tasks that can start now and could not before: those whose earlier turns have their replies."""
        ready = []
        for place in range(len(self.request.tasks)):
            if place not in self._begun and self.history(place) is not None:
                self._begun.add(place)
                ready.append(place)
        return ready

    def history(self, place: int) -> list[Reply] | None:
        """Returns the replies to the turns before a task; None while one is missing.

        Raises:
            ValueError: A turn before it is not a task of this request.
        """
        tasks = self.request.tasks
        before = []
        for count in range(1, len(tasks[place].turns)):
            turns = tasks[place].turns[:count]
            asked = next((other for other in range(place) if tasks[other].turns == turns), None)
            if asked is None:
                raise ValueError(
                    f"task {tasks[place].name!r} follows the turn {turns[-1].prompt!r}, which is not an earlier task"
                )
            before.append(asked)
        if not all(asked in self._replies for asked in before):
            return None
        return [self._replies[asked] for asked in before]

    def reply(self, place: int, reply: Reply) -> None:
        """Records the reply to one of its tasks; the last one completes the future."""
        self._replies[place] = reply
        if len(self._replies) == len(self.request.tasks) and not self.done:
            self.future.set_result([self._replies[index] for index in range(len(self._replies))])

    def fail(self, error: BaseException) -> None:
        """Fails the request, unless it is already done."""
        if not self.done:
            self.future.set_exception(error)


class JobQueue:
    """Queues requests for the engine's thread, a bounded number for each caller, and serves callers in turn.

    Every queued job is either taken or, when the queue is closed, failed.

    Args:
        max_jobs: Most waiting jobs of a caller.
        max_seconds: Most waiting audio of a caller, in seconds; a single longer job is accepted.
    """

    def __init__(self, max_jobs: int, max_seconds: float) -> None:
        self._max_jobs = max_jobs
        self._max_seconds = max_seconds
        self._waiting: dict[int, deque[Job]] = {}  # by caller, whose turn it is first
        self._changed = threading.Condition()  # its lock may be taken again by who has it
        self._numbers = itertools.count()
        self._failure: EngineFailed | None = None
        self._idle_s = 0.0
        self._begun = False

    def __len__(self) -> int:
        with self._changed:
            return sum(len(jobs) for jobs in self._waiting.values())

    def put(self, job: Job, caller: int | None = None) -> None:
        """Appends a job; blocks while this caller (by default: thread) has enough waiting jobs.

        Raises:
            EngineFailed: The queue is closed; the message says why.
        """
        caller = threading.get_ident() if caller is None else caller
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._has_room(job, caller))
            self.raise_if_closed()
            job.number = next(self._numbers)
            self._waiting.setdefault(caller, deque()).append(job)
            self._changed.notify_all()

    def take(self, fits: Callable[[Job], bool], *, wait: bool) -> Job | None:
        """Takes the next job that fits, and marks it as running. Callers take turns; each is served in its order.

        Other jobs may overtake one that does not fit, but only a bounded number: then it must be the next.

        Args:
            fits: Returns whether there is a slot for a job.
            wait: Whether to wait while there is no job.

        Returns:
            The job; None if no job fits, or there is none.

        Raises:
            EngineFailed: The queue is closed.
        """
        with self._changed:
            if wait:
                self._wait()
            self.raise_if_closed()
            order = [(caller, job) for caller, jobs in self._waiting.items() for job in jobs]
            overdue = [(caller, job) for caller, job in order if job.passed >= _MOST_PASSES]
            for caller, job in overdue[:1] or order:
                if not (job.future.cancelled() or fits(job)):
                    continue
                self._remove(caller, job)
                # Under the lock, so that close() finds each job either here or running.
                if not job.future.set_running_or_notify_cancel():
                    continue  # cancelled
                for _, other in order:
                    other.passed += other.number < job.number
                return job
            return None

    def _remove(self, caller: int, job: Job) -> None:
        """Removes a job and moves its caller to the end of the order; forgets a caller without jobs."""
        jobs = self._waiting.pop(caller)
        jobs.remove(job)
        if jobs:
            self._waiting[caller] = jobs
        self._changed.notify_all()

    def close(self, failure: EngineFailed) -> None:
        """Fails the waiting and all future jobs; the first reason given is kept."""
        with self._changed:
            self._failure = self._failure or failure
            jobs = [job for waiting in self._waiting.values() for job in waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                job.fail(self._failure)

    @property
    def is_open(self) -> bool:
        """Whether jobs are still accepted."""
        return self._failure is None

    def raise_if_closed(self) -> None:
        """Raises the error that the queue was closed with, if it is closed."""
        if self._failure:
            raise self._failure

    def take_idle_s(self) -> float:
        """Returns the seconds that `take` waited for jobs since the last call, from the first job on."""
        with self._changed:
            idle_s, self._idle_s = self._idle_s, 0.0
        return idle_s

    def _wait(self) -> None:
        began = time.perf_counter()
        self._changed.wait_for(lambda: self._waiting or self._failure)
        if self._begun:
            self._idle_s += time.perf_counter() - began
        self._begun = True

    def _has_room(self, job: Job, caller: int) -> bool:
        waiting = self._waiting.get(caller, ())
        seconds = sum(other.seconds for other in waiting) + job.seconds
        return not waiting or (len(waiting) < self._max_jobs and seconds <= self._max_seconds)


def isolate(
    items: Sequence[T],
    work: Callable[[Sequence[T]], None],
    fail: Callable[[T, Exception], None],
    after_failure: Callable[[Exception], None],
) -> None:
    """Applies work to all items; if it raises, to each half, down to the items that cause the error.

    Args:
        items: The items; may be empty.
        work: Processes items, all or none: if it raises, none was processed.
        fail: Receives each item that causes an error, and the error.
        after_failure: Called with each exception before the halves are tried; an exception from it ends everything.
    """
    if not items:
        return
    try:
        work(items)
        return
    except Exception as error:  # noqa: BLE001 (whatever it is, it belongs to one item)
        after_failure(error)
        if len(items) == 1:
            fail(items[0], error)
            return
    # Outside of the except block: the exception, and the tensors that its frames reference, are freed by now.
    middle = len(items) // 2
    isolate(items[:middle], work, fail, after_failure)
    isolate(items[middle:], work, fail, after_failure)
