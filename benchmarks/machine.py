"""What a figure was measured on, in one line."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe() -> str:
    cpu = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    found = {name: version(name) for name in ("apache-beam", "torch", "transformers")}
    return f"{os.cpu_count()} cores ({cpu}), Python {platform.python_version()}, " + ", ".join(
        f"{name} {number}" for name, number in found.items()
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
