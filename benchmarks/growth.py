"""Measures whether the engine's memory grows with the number of requests."""

import collections
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from af3pipe.models import caption, resolve
from af3pipe.models.engine import Engine
from af3pipe.schemas import Request
from benchmarks import contenders

AHEAD = 64  # requests submitted beyond the one that is waited for
NEW_TOKENS = 4
EVERY = 100


class Growth(NamedTuple):
    """Resident memory of the process.

    Attributes:
        points: (requests answered, MiB), every 1,000.
        slope: MiB a thousand requests, by least squares over all but the first fifth: that is warm-up.
    """

    points: list[tuple[int, float]]
    slope: float


def measure(opened: Engine, count: int, seed: int) -> Growth:
    """Answers so many requests of 1 s of noise and 1 to 3 tasks of 4 new tokens, and keeps nothing of them."""
    rng = np.random.default_rng(seed)
    task = resolve(caption(), opened.info.family)._replace(decoding=contenders.exactly(NEW_TOKENS))
    waiting: collections.deque = collections.deque()
    found = [(0, resident_mib())]
    for number in range(1, count + 1):
        samples = 0.1 * rng.standard_normal(16_000, dtype=np.float32)
        waiting.append(opened.submit(Request(samples, (task,) * int(rng.integers(1, 4)))))
        while len(waiting) > (AHEAD if number < count else 0):
            waiting.popleft().result()
        if number % EVERY == 0:
            found.append((number, resident_mib()))
        if number % 1000 == 0:
            print(f"{number:6} requests: {found[-1][1]:8.1f} MiB", flush=True)
    settled = [(number / 1000, mib) for number, mib in found if number >= count / 5]
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope
    return Growth([point for point in found if point[0] % 1000 == 0], slope)


def resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024
