"""Provides an engine that takes a fixed time per window, as a GPU would, and leaves the CPU to the pipeline.

It serves to measure how fast the pipeline feeds the engine. It is importable, so that workers find it by its
registered name, and it has the real queue.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from af3pipe.models.engine import ENGINES, EngineFailed, EngineInfo, EngineOptions, EngineStats
from af3pipe.models.family import open_checkpoint
from af3pipe.models.scheduler import Job, JobQueue
from af3pipe.schemas import Reply, Request

SAMPLE_RATE = 16_000
WINDOW_SAMPLES = 30 * SAMPLE_RATE

window_s = 0.040
"""Seconds a window; read when a batch is answered."""


class ConstantEngine:
    """Answers in batches, after `window_s` a window; keeps the books of `EngineStats`."""

    def __init__(self, options: EngineOptions) -> None:
        self._slots = options.slots or 16
        # Whose answers these are said to be: as those of a real engine, so that runs can be resumed.
        model = open_checkpoint(options.model, options.revision)
        self.info = EngineInfo(
            model.model_id, model.revision, model.family, model.licence, "constant", "none", "none", self._slots
        )
        self._queue = JobQueue(2 * self._slots, options.queue_audio_s)
        self._stats = EngineStats()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return self._queue.is_open

    def ask_alone(self, request: Request) -> "Future[list[Reply]]":
        return self.submit(request)

    def submit(self, request: Request) -> "Future[list[Reply]]":
        job = Job(request, len(request.samples) / SAMPLE_RATE)
        self._queue.put(job)
        return job.future

    def take_stats(self) -> EngineStats:
        with self._lock:
            stats, self._stats = self._stats, EngineStats()
        return stats._replace(idle_s=self._queue.take_idle_s())

    def close(self) -> None:
        self._queue.close(EngineFailed("the engine was closed"))
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                jobs = [self._queue.take(_any, wait=True)]
                while len(jobs) < self._slots and jobs[-1]:
                    jobs.append(self._queue.take(_any, wait=False))
            except EngineFailed:
                return
            self._answer([job for job in jobs if job])

    def _answer(self, jobs: Sequence[Job]) -> None:
        windows = sum(-(-len(job.request.samples) // WINDOW_SAMPLES) for job in jobs)
        time.sleep(window_s * windows)
        with self._lock:
            told = self._stats
            self._stats = told._replace(
                requests=told.requests + len(jobs),
                windows=told.windows + windows,
                steps=told.steps + 1,
                # What was to be slept: whatever the machine adds to it is no work of a GPU's.
                decode_s=told.decode_s + window_s * windows,
            )
        for job in jobs:
            for task in range(len(job.request.tasks)):
                job.reply(task, Reply("text", (1,), "stop", 1, 2))


def _any(job: Job) -> bool:
    return True


def register() -> str:
    """Makes the engine known to `open_engine`, and gives its name."""
    ENGINES["constant"] = f"{__name__}:ConstantEngine"
    return "constant"
