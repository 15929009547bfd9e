"""The one way this package counts: a Beam metric for the runner, and a tally of this process for a live display."""

import threading
from collections import Counter

from apache_beam.metrics import Metrics

NAMESPACE = "af3pipe"

_tally: Counter[str] = Counter()
_lock = threading.Lock()


def count(name: str, amount: int = 1) -> None:
    """Adds to a counter. Call it on a bundle's own thread: Beam drops what other threads count."""
    Metrics.counter(NAMESPACE, name).inc(amount)
    with _lock:
        _tally[name] += amount


def count_seconds(name: str, seconds: float) -> None:
    """Adds a duration; Beam counts in whole numbers, so it is kept in milliseconds, under `NAME_ms`."""
    count(f"{name}_ms", round(seconds * 1000))


def observe(name: str, value: int) -> None:
    """Adds one value to a distribution (count, sum, minimum, maximum)."""
    Metrics.distribution(NAMESPACE, name).update(value)


def tally() -> Counter[str]:
    """What this process has counted so far, over all pipelines it ran. For a display; runs read Beam's metrics."""
    with _lock:
        return _tally.copy()
