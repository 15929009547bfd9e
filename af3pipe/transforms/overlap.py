"""Provides a DoFn that processes many elements of a bundle concurrently, for slow or remote work.

`process` starts an element's work and gets a Future for it; outputs are emitted with the timestamp and window of
their element; if too many elements are pending, `process` blocks; `finish_bundle` emits the rest. Beam's
`with_exception_handling` does not cover `finish_bundle`, so subclasses turn failed futures into dead letters.
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


class _Pending(NamedTuple):
    element: Any
    future: "Future[Any]"
    weight: float
    timestamp: Any
    window: Any


class OverlapDoFn(SentByLauncher, beam.DoFn, Generic[Element, Result]):
    """Emits each element's outputs when its future is done, with a bounded number of pending elements.

    Args:
        max_pending: Largest number of pending elements.
        max_pending_weight: Largest total weight of pending elements, in the unit of `weigh`; a single heavier element
            is still processed.
    """

    def __init__(self, max_pending: int, max_pending_weight: float = float("inf")) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending is {max_pending}; it must be at least 1")
        self._max_pending = max_pending
        self._max_weight = max_pending_weight
        self._pending: deque[_Pending] = deque()

    def submit(self, element: Element) -> "Future[Result]":
        """Starts the work on an element and returns its future."""
        raise NotImplementedError

    def emit(self, element: Element, future: "Future[Result]") -> Iterator[Any]:
        """Yields the outputs of an element whose future is done, tagged or not; turns failure into a dead letter."""
        raise NotImplementedError

    def weigh(self, element: Element) -> float:
        """Returns the weight of an element while it is pending, for example its seconds of audio."""
        return 0.0

    def start_bundle(self) -> None:
        self._abandon()  # work of a failed bundle, whose elements are processed again

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

    def _abandon(self) -> None:
        for pending in self._pending:
            pending.future.cancel()
        self._pending.clear()


def _windowed(output: Any, pending: _Pending) -> Any:
    if isinstance(output, TaggedOutput):
        return TaggedOutput(output.tag, WindowedValue(output.value, pending.timestamp, (pending.window,)))
    return WindowedValue(output, pending.timestamp, (pending.window,))
