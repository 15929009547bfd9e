"""Measures the machine's peak performance, and the time that the engine's decoding steps lose in Python.

All of it uses the number of threads that torch is set to, as the benchmarks do.
"""

import statistics
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from af3pipe.models.engine import Engine, EngineStats
from af3pipe.schemas import Request
from benchmarks import contenders
from benchmarks.flops import Dims

STEPS = 128


class Ceilings(NamedTuple):
    """Of a device, in one dtype.

    Attributes:
        flops: Of a matrix product, a second.
        bandwidth: Bytes a second, read and written, of a copy.
    """

    flops: float
    bandwidth: float


def measure(device: torch.device, dtype: torch.dtype, dims: Dims) -> Ceilings:
    """The faster of two matrix products, one of the encoder's and a large square one; and a large copy."""
    size = 8192 if device.type == "cuda" else 2048
    shapes = [(8 * 1500, dims.audio_width, dims.audio_ffn), (size, size, size)]
    flops = max(2 * m * k * n / _product_s(m, k, n, device, dtype) for m, k, n in shapes)
    entries = (2**31 if device.type == "cuda" else 2**28) // dtype.itemsize
    source = torch.ones(entries, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy_s = _median_s("target.copy_(source)", {"target": target, "source": source})
    return Ceilings(flops, 2 * entries * dtype.itemsize / copy_s)


def _product_s(m: int, k: int, n: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    return _median_s("torch.mm(a, b, out=c)", {"a": a, "b": b, "c": a.new_empty(m, n)})


def _median_s(statement: str, names: dict[str, Any]) -> float:
    """Seconds of a statement; warmed up, repeated for half a second and more, waits for the device."""
    timer = Timer(statement, globals={"torch": torch, **names}, num_threads=torch.get_num_threads())
    timer.timeit(3)
    return float(timer.blocked_autorange(min_run_time=0.5).median)


class PythonShare(NamedTuple):
    """Share of the wall time of decoding steps in which no tensor operation ran.

    Attributes:
        least: Beside steps that were not profiled: what the profiler adds to operations is counted as theirs.
        most: Of the profiled steps: what it adds between them is counted as Python's.
        step_ms: A step that was not profiled.
    """

    least: float
    most: float
    step_ms: float


def python_share(opened: Engine, request: Request, repeat: int = 3) -> PythonShare:
    """Python's share of decoding, with all slots taken by the same short request: there it weighs most.

    The requests are answered with 1 new token and with 129: what the second takes more is 128 decoding steps. Their
    wall seconds, as the engine counts them (`decode_s`), come from runs that are not profiled, the median of several.
    Another pair is profiled, on all threads: the time within operations, a nested one counted once. On CUDA
    operations only launch kernels, so there the kernels' own time is taken: the share is of the time that the device
    had nothing to do.
    """
    few, many = ([_with_tokens(request, count)] * opened.info.slots for count in (1, 1 + STEPS))
    _stats(opened, many)  # warm
    walls_s, steps = [], 1
    for _ in range(repeat):
        more, less = _stats(opened, many), _stats(opened, few)
        walls_s.append(more.decode_s - less.decode_s)
        steps = max(1, more.steps - less.steps)
    wall_s = statistics.median(walls_s)
    more, more_within_s = _profiled(opened, many)
    less, less_within_s = _profiled(opened, few)
    within_s, profiled_s = more_within_s - less_within_s, more.decode_s - less.decode_s
    return PythonShare(max(0.0, 1 - within_s / wall_s), 1 - within_s / profiled_s, 1000 * wall_s / steps)


def _with_tokens(request: Request, count: int) -> Request:
    decoding = contenders.exactly(count)
    return request._replace(tasks=tuple(task._replace(decoding=decoding) for task in request.tasks))


def _stats(opened: Engine, requests: list[Request]) -> EngineStats:
    opened.take_stats()
    contenders.engine(opened, requests)
    return opened.take_stats()


def _profiled(opened: Engine, requests: list[Request]) -> tuple[EngineStats, float]:
    """The engine's books and the seconds within operations."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    config = _ExperimentalConfig(profile_all_threads=True)  # the engine works in a thread of its own
    with profile(activities=activities, experimental_config=config) as profiler:
        told = _stats(opened, requests)
    return told, _operations_s(profiler, opened.info.device)


def _operations_s(profiler: profile, device: str) -> float:
    """Seconds within tensor operations of the engine's thread, or within kernels."""
    wanted = torch.autograd.DeviceType.CUDA if device.startswith("cuda") else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() or () if event.device_type == wanted]
    if wanted == torch.autograd.DeviceType.CPU:
        events = [event for event in events if event.name.startswith("aten::") and not _within_another(event)]
    return sum(event.time_range.elapsed_us() for event in events) / 1e6


def _within_another(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or _within_another(parent))
