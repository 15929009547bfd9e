"""A DoFn that waits on something slow for many elements at once, and so keeps it busy.

`process` starts an element's work and takes a Future for it; what is done is emitted with the timestamp and the
window of its own element; when too much is pending, `process` blocks; `finish_bundle` emits the rest. Beam's
`with_exception_handling` does not reach `finish_bundle`, so a subclass turns failed futures into dead letters.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Generic, NamedTuple, TypeVar

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput
from apache_beam.utils.windowed_value import WindowedValue

from af3pipe.transforms.launcher import SentByLauncher

Element = TypeVar("Element")
Result = TypeVar("Result")
DONE = "done"
"""Tag of the element itself behind its outputs, from a DoFn that `tells_done`."""


class _Pending(NamedTuple):
    element: Any
    future: "Future[Any]"
    weight: float
    timestamp: Any
    window: Any


class OverlapDoFn(SentByLauncher, beam.DoFn, Generic[Element, Result]):
    """Emits each element's outputs once its future is done, keeping a bounded number of them pending.

    Args:
        max_pending: Most elements under way.
        max_pending_weight: Most weight under way, in the unit of `weigh`; a heavier single element still passes.

    Attributes:
        tells_done: Whether the tag `DONE` says when all outputs of an element have been emitted: they are not
            interleaved with those of another.
    """

    tells_done = False

    def __init__(self, max_pending: int, max_pending_weight: float = float("inf")) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending is {max_pending}; at least 1 element must be allowed under way")
        self._max_pending = max_pending
        self._max_weight = max_pending_weight
        self._pending: deque[_Pending] = deque()

    def submit(self, element: Element) -> "Future[Result]":
        """Starts the work."""
        raise NotImplementedError

    def emit(self, element: Element, future: "Future[Result]") -> Iterator[Any]:
        """The outputs of an element whose future is done, tagged or not; turns its failure into a dead letter."""
        raise NotImplementedError

    def weigh(self, element: Element) -> float:
        """What the element holds while it is pending, for example its seconds of audio."""
        return 0.0

    def start_bundle(self) -> None:
        self._abandon()  # of a bundle that failed: its elements come again

    def process(
        self,
        element: Element,
        timestamp: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Any]:
        weight = self.weigh(element)
        while self._pending and self._is_full(weight):
            yield from self._emit_done(block=True)
        self._pending.append(_Pending(element, self.submit(element), weight, timestamp, window))
        yield from self._emit_done(block=False)

    def finish_bundle(self) -> Iterator[Any]:
        while self._pending:
            yield from self._emit_done(block=True)

    def teardown(self) -> None:
        self._abandon()

    def _is_full(self, weight: float) -> bool:
        pending_weight = sum(pending.weight for pending in self._pending)
        return len(self._pending) >= self._max_pending or pending_weight + weight > self._max_weight

    def _emit_done(self, *, block: bool) -> Iterator[Any]:
        if block:
            wait([pending.future for pending in self._pending], return_when=FIRST_COMPLETED)
        done: list[_Pending] = []
        waiting: deque[_Pending] = deque()
        for pending in self._pending:
            (done if pending.future.done() else waiting).append(pending)
        self._pending = waiting
        for pending in done:
            for output in self.emit(pending.element, pending.future):
                yield _windowed(output, pending)
            if self.tells_done:
                yield _windowed(TaggedOutput(DONE, pending.element), pending)

    def _abandon(self) -> None:
        for pending in self._pending:
            pending.future.cancel()
        self._pending.clear()


def _windowed(output: Any, pending: _Pending) -> Any:
    if isinstance(output, TaggedOutput):
        return TaggedOutput(output.tag, WindowedValue(output.value, pending.timestamp, (pending.window,)))
    return WindowedValue(output, pending.timestamp, (pending.window,))
