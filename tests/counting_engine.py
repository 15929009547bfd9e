"""Provides an echo engine that records its requests. Registered in `ENGINES` by the test."""

from typing import ClassVar

from tests.echo_engine import EchoEngine


class CountingEngine(EchoEngine):
    """Notes the (task, question) pairs of each request, in `asked`."""

    asked: ClassVar[list] = []

    def submit(self, request):
        self.asked.append([(task.name, task.question) for task in request.tasks])
        return super().submit(request)
