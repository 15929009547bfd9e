"""Counts events, both as Beam metrics and in a tally of this process for the progress display."""

import functools
import threading
from collections import Counter

from apache_beam.metrics import Metrics

NAMESPACE = "af3pipe"

_tally: Counter[str] = Counter()
_lock = threading.Lock()


_counter = functools.cache(functools.partial(Metrics.counter, NAMESPACE))  # making one costs more than counting


def count(name: str, amount: int = 1) -> None:
    """Adds to a counter. Call it on a bundle's own thread, because Beam drops counts of other threads."""
    if amount:
        _counter(name).inc(amount)
        with _lock:
            _tally[name] += amount


def count_seconds(name: str, seconds: float) -> None:
    """Adds a duration to the counter `NAME_ms`, in milliseconds, since Beam's counters are integers."""
    count(f"{name}_ms", round(seconds * 1000))


def observe(name: str, value: int) -> None:
    """Adds one value to a distribution (count, sum, minimum, maximum)."""
    Metrics.distribution(NAMESPACE, name).update(value)


def tally() -> Counter[str]:
    """Returns this process's counts over all its pipelines, for a display only; run reports use Beam's metrics."""
    with _lock:
        return _tally.copy()
