"""Prefetches: calls a function for many items concurrently, to hide the latency of a store."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_AT_ONCE = 16

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


def each(function: Callable[[_Item], _Value], items: Iterable[_Item]) -> Iterator[_Value]:
    """Maps a function over items with up to 16 concurrent calls; yields the results in the order of the items."""
    ahead: deque[Future[_Value]] = deque()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) == _AT_ONCE:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
