"""Provides an engine that replies only when the test lets it. Registered in `ENGINES` by the test."""

from concurrent.futures import Future
from typing import Any, ClassVar, NamedTuple

from af3pipe.models.engine import EngineInfo, EngineStats
from af3pipe.models.family import open_checkpoint
from af3pipe.schemas import Reply


class Held(NamedTuple):
    """A request without a reply yet."""

    request: Any
    future: Future

    def reply(self):
        replies = [
            Reply(f"{task.name}: {len(self.request.samples)}", (1,), "stop", 1, 2) for task in self.request.tasks
        ]
        self.future.set_result(replies)


class HeldEngine:
    """Keeps its requests in `held`, in the order in which they come; one that is answered stays there."""

    held: ClassVar[list] = []

    def __init__(self, options):
        model = open_checkpoint(options.model)
        slots = options.slots or 1
        self.info = EngineInfo("demo", model.revision, model.family, "l", "held", "float32", "cpu", slots)
        self.is_open = True

    def submit(self, request):
        future = Future()
        self.held.append(Held(request, future))
        return future

    def take_stats(self):
        return EngineStats()

    def close(self):
        self.is_open = False
