"""Which requests are worked on together, and what one failure takes down: itself alone. Plain Python, no torch."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from af3pipe.models.engine import EngineFailed
from af3pipe.schemas import Reply, Request

T = TypeVar("T")

_GATHER_S = 0.05  # how long a batch that is not full waits for more
_QUEUED_BATCHES = 2  # how much may wait before put blocks


class Job:
    """A request, its future, and the replies it has so far.

    Attributes:
        rows: Prompts it will become, one a task.
        seconds: Of audio, summed over those prompts.
    """

    def __init__(self, request: Request, segment_s: float) -> None:
        self.request = request
        self.rows = len(request.tasks)
        self.seconds = segment_s * self.rows
        self.future: Future[list[Reply]] = Future()
        self._replies: dict[int, Reply] = {}

    @property
    def done(self) -> bool:
        """Whether it is answered, or has failed: nothing more needs to be done for it."""
        return self.future.done()

    def reply(self, task: int, reply: Reply) -> None:
        """Files the reply to one of its tasks; the last one answers the request."""
        self._replies[task] = reply
        if len(self._replies) == self.rows and not self.done:
            self.future.set_result([self._replies[index] for index in range(self.rows)])

    def fail(self, error: BaseException) -> None:
        """Fails the request, unless it is already done."""
        if not self.done:
            self.future.set_exception(error)


class JobQueue:
    """Requests waiting for the engine's thread: bounded, first come first served, handed out in batches.

    Every job that was put is either taken or, when the queue is closed, failed.
    """

    def __init__(self, batch_size: int, batch_audio_s: float) -> None:
        self._batch_size = batch_size
        self._batch_audio_s = batch_audio_s
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._failure: EngineFailed | None = None
        self._idle_s = 0.0
        self._begun = False

    def put(self, job: Job) -> None:
        """Appends a job; blocks while about two batches are waiting.

        Raises:
            EngineFailed: The queue is closed, with the reason it was closed for.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._has_room(job))
            self.raise_if_closed()
            self._jobs.append(job)
            self._changed.notify_all()

    def take(self) -> list[Job]:
        """The next batch of jobs, all of them marked as running; waits a moment for one that is not yet full.

        Raises:
            EngineFailed: The queue is closed.
        """
        with self._changed:
            began = time.perf_counter()
            self._changed.wait_for(lambda: self._jobs or self._failure)
            if not self._begun:
                began, self._begun = time.perf_counter(), True
            self._changed.wait_for(lambda: self._failure or self._fitting()[1], _GATHER_S)
            self._idle_s += time.perf_counter() - began
            self.raise_if_closed()
            jobs = [self._jobs.popleft() for _ in range(self._fitting()[0])]
            self._changed.notify_all()
            # Under the lock, so that close() finds each job either here or running.
            return [job for job in jobs if job.future.set_running_or_notify_cancel()]

    def close(self, failure: EngineFailed) -> None:
        """Fails the jobs that wait and all that come; the first reason given stands."""
        with self._changed:
            self._failure = self._failure or failure
            jobs = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                job.fail(self._failure)

    @property
    def is_open(self) -> bool:
        """Whether jobs may still be put."""
        return self._failure is None

    def raise_if_closed(self) -> None:
        """Raises what the queue was closed with, once it is."""
        if self._failure:
            raise self._failure

    def take_idle_s(self) -> float:
        """Seconds that `take` waited for jobs since this was last asked, counted from the first job on."""
        with self._changed:
            idle_s, self._idle_s = self._idle_s, 0.0
        return idle_s

    def _has_room(self, job: Job) -> bool:
        rows = sum(waiting.rows for waiting in self._jobs) + job.rows
        seconds = sum(waiting.seconds for waiting in self._jobs) + job.seconds
        return not self._jobs or (
            rows <= _QUEUED_BATCHES * self._batch_size and seconds <= _QUEUED_BATCHES * self._batch_audio_s
        )

    def _fitting(self) -> tuple[int, bool]:
        """How many jobs at the head make a batch (at least one, however large), and whether it is full."""
        rows, seconds = 0, 0.0
        for count, job in enumerate(self._jobs):
            rows, seconds = rows + job.rows, seconds + job.seconds
            if count and (rows > self._batch_size or seconds > self._batch_audio_s):
                return count, True
        return len(self._jobs), rows >= self._batch_size or seconds >= self._batch_audio_s


def isolate(
    items: Sequence[T],
    work: Callable[[Sequence[T]], None],
    fail: Callable[[T, Exception], None],
    after_failure: Callable[[Exception], None],
) -> None:
    """Does the work on all items; where it raises, on halves, down to the one that is to blame.

    Args:
        items: What to work on; may be empty.
        work: All or nothing: when it raises, none of its items is worked on.
        fail: Takes the item to blame, and what it raised.
        after_failure: Called with each exception before the halves are tried; what it raises ends everything.
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
    # Outside of the except block: the exception, and the tensors its frames hold, are gone by now.
    middle = len(items) // 2
    isolate(items[:middle], work, fail, after_failure)
    isolate(items[middle:], work, fail, after_failure)
