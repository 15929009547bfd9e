"""An engine that takes a fixed time a window, as a GPU would, and leaves the CPU to those who feed it.

For measuring what feeds the engine; importable, so that a worker finds it by the name it is registered under.
"""

import queue
import threading
import time
from concurrent.futures import Future

from af3pipe.models.engine import ENGINES, EngineInfo, EngineOptions, EngineStats
from af3pipe.schemas import Reply, Request

WINDOW_S = 0.040
_WINDOW_SAMPLES = 480_000
_CLOSE = None


class ConstantEngine:
    """Answers in batches, after `WINDOW_S` a window; keeps the books of `EngineStats`."""

    def __init__(self, options: EngineOptions) -> None:
        self.info = EngineInfo("constant", "1", "AudioFlamingo3", "none", "constant", "none", "none")
        self._batch_size = options.batch_size
        self._queue: queue.Queue = queue.Queue(2 * options.batch_size)
        self._stats = EngineStats()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    is_open = True

    def submit(self, request: Request) -> "Future[list[Reply]]":
        future: Future[list[Reply]] = Future()
        self._queue.put((request, future))
        return future

    def take_stats(self) -> EngineStats:
        with self._lock:
            stats, self._stats = self._stats, EngineStats()
        return stats

    def close(self) -> None:
        self._queue.put(_CLOSE)
        self._thread.join()

    def _run(self) -> None:
        first = True
        while True:
            began = time.perf_counter()
            batch = [self._queue.get()]
            idle_s = 0.0 if first else time.perf_counter() - began
            first = False
            while len(batch) < self._batch_size and batch[-1] is not _CLOSE:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            work = [found for found in batch if found is not _CLOSE]
            if work:
                self._answer(work, idle_s)
            if batch[-1] is _CLOSE:
                return

    def _answer(self, work: list, idle_s: float) -> None:
        windows = sum(-(-len(request.samples) // _WINDOW_SAMPLES) for request, _ in work)
        time.sleep(WINDOW_S * windows)
        with self._lock:
            told = self._stats
            self._stats = told._replace(
                requests=told.requests + len(work),
                windows=told.windows + windows,
                batches=told.batches + 1,
                decode_s=told.decode_s + WINDOW_S * windows,
                idle_s=told.idle_s + idle_s,
            )
        for request, future in work:
            future.set_result([Reply("text", (1,), "stop", 1, 2) for _ in request.tasks])


def register() -> str:
    """Makes the engine known to `open_engine`, and gives its name."""
    ENGINES["constant"] = f"{__name__}:ConstantEngine"
    return "constant"
