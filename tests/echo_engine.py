"""Provides an engine whose replies describe the audio, so that all differ. Registered in `ENGINES` by the test."""

from af3pipe.schemas import Reason, Rejected, Reply, Stage
from benchmarks.constant_engine import SAMPLE_RATE, ConstantEngine

FAILS_S = 3.0  # of the recordings for which there is no memory


class EchoEngine(ConstantEngine):
    """Says the task, and length and loudness of the audio; fails for one of exactly `FAILS_S`."""

    def _answer(self, jobs):
        for job in jobs:
            samples = job.request.samples
            if len(samples) == FAILS_S * SAMPLE_RATE:
                job.future.set_exception(Rejected(Stage.GENERATE, Reason.OUT_OF_MEMORY, "too large for this engine"))
                continue
            for number, task in enumerate(job.request.tasks):
                heard = f"{task.name}: {len(samples)} samples, {float(abs(samples).sum()):.3f}"
                job.reply(number, Reply(heard, (1,), "stop", 1, 2))
