"""Describes the machine of a measurement in one line, and measures the resources of a process and its children."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe() -> str:
    cpu = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    found = {}
    for name in ("apache-beam", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):  # not all benchmarks need all of them
            found[name] = version(name)
    return f"{os.cpu_count()} cores ({cpu}), Python {platform.python_version()}, " + ", ".join(
        f"{name} {number}" for name, number in found.items()
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def cpu_s() -> float:
    """Of this process and of all that it started and that still run."""
    ticks = sum(_ticks(pid) for pid in children())
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + ticks / os.sysconf("SC_CLK_TCK")


def children(pid: int | str = "self") -> Iterator[int]:
    """Processes that `pid` started, and those that they did."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            yield child
            yield from children(child)


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15]))  # user and system time, its ended children's included
