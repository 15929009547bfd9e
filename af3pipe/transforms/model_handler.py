"""Provides a model handler for Beam's RunInference, which uses the same engine as the transforms."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from af3pipe.models.engine import EngineOptions, acquire_engine, release_engine
from af3pipe.models.tasks import resolve
from af3pipe.schemas import DeadLetter, Request, Segment, Stage, Task
from af3pipe.transforms.ask import check_tasks, request_seed
from af3pipe.transforms.outcome import outcomes, to_dead_letter

_BATCH_SIZE = 64  # the slots of an engine on a GPU: RunInference waits for a whole batch


class _AcquiredEngine:
    """Acquires the process's engine, and releases it when RunInference drops its reference to the model."""

    def __init__(self, options: EngineOptions) -> None:
        self.engine = acquire_engine(options)
        weakref.finalize(self, release_engine, options)


class AudioFlamingoModelHandler(ModelHandler[Segment, PredictionResult, _AcquiredEngine]):
    """Runs inference over `Segment`; `PredictionResult.inference` is a list of `Reply`, one per task.

    A failed request has its `DeadLetter` as `inference`, so that it does not fail its batch. Prefer
    `AskAudioFlamingo` if you can: it keeps timestamps, keeps the engine busy across elements, and counts.

    Args:
        options: The model and the engine's settings.
        tasks: Tasks for every segment.

    Raises:
        ValueError: There is no task, or two have the same name and question.
    """

    def __init__(self, options: EngineOptions, tasks: Sequence[Task]) -> None:
        super().__init__(max_batch_size=options.slots or _BATCH_SIZE)
        check_tasks(tasks)
        self._options = options
        self._tasks = tuple(tasks)

    def load_model(self) -> _AcquiredEngine:
        return _AcquiredEngine(self._options)

    def run_inference(
        self, batch: Sequence[Segment], model: _AcquiredEngine, inference_args: dict[str, Any] | None = None
    ) -> Iterator[PredictionResult]:
        info = model.engine.info
        tasks = tuple(resolve(task, info.family) for task in self._tasks)
        futures = [model.engine.submit(Request(segment.samples, tasks, request_seed(segment))) for segment in batch]
        for segment, future in zip(batch, futures, strict=True):

            def lost(error: Exception, segment: Segment = segment) -> DeadLetter:
                return to_dead_letter(error, segment.recording, stage=Stage.GENERATE, segment=segment, tasks=tasks)

            for inference in outcomes((one.result() for one in (future,)), lost):
                yield PredictionResult(segment, inference, info.model_id)

    def get_num_bytes(self, batch: Sequence[Segment]) -> int:
        return sum(segment.samples.nbytes for segment in batch)  # Beam's own way pickles the batch to see its size

    def get_metrics_namespace(self) -> str:
        return "af3pipe"

    def validate_inference_args(self, inference_args: Mapping[str, Any] | None) -> None:
        if inference_args:
            raise ValueError(f"inference_args {sorted(inference_args)} are not used; set them on the tasks")
