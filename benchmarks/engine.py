"""Compares the engine with unmodified Hugging Face code, and with the machine's peak performance.

    python -m benchmarks.engine [--mixes short mixed long] [--requests 200] [--alone N] [--repeat 3] [--out FILE.md]
    python -m benchmarks.engine --shape af3-7b --requests 200 --alone 20 --repeat 1     # random weights; needs a GPU
    python -m benchmarks.engine --growth 10000

Three contenders process the same requests in turns, in one process, with the same model, dtype and threads:

alone: the model card's loop, one recording at a time.
batches: unmodified `generate` over static batches of 8 in the order of arrival.
engine: this package's engine, all requests submitted from one thread; its queue and threads are measured, too.

All decode greedily and generate exactly the requested number of tokens, so that all do the same work. The replies of
`batches` and `engine` are compared with those of `alone`, token by token; in float32 a difference makes this exit
with 1. Audio is in memory, models are loaded and warm, and each contender has the cores to itself
(`contenders.apart`). With `--alone N`, `alone` processes only N of the requests, of all reply lengths, and its time
is scaled to all.

floor: see benchmarks/flops.py and docs/benchmarks.md; python: see benchmarks/ceilings.py.
"""

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from af3pipe.models import EngineOptions, answer, caption, resolve, transcript
from af3pipe.models.engine import Engine, EngineInfo, EngineStats
from af3pipe.schemas import Request, Task
from benchmarks import ceilings, contenders, flops, growth, machine
from benchmarks.contenders import Loaded, Tokens, alone, apart, batches

RATE = 16_000
WORK = ("encode_s", "prefill_s", "decode_s")


class Mix(NamedTuple):
    """What requests are drawn from, evenly: shortest and longest audio, fewest and most new tokens."""

    seconds: tuple[float, float]
    new_tokens: tuple[int, int]


MIXES = {
    "short": Mix((1, 5), (16, 128)),
    "mixed": Mix((2, 60), (8, 128)),
    "long": Mix((30, 95), (8, 64)),
    "3 s": Mix((3, 3), (16, 256)),
    "30 s": Mix((30, 30), (16, 256)),
}
USUAL = {"demo": ["short", "mixed", "long"], "af3-7b": ["3 s", "30 s"]}


class Bench(NamedTuple):
    """What is measured: the engine's options, the same model for the stock contenders, and how often."""

    options: EngineOptions
    shares_weights: bool
    info: EngineInfo
    stock: Loaded
    dims: flops.Dims
    repeat: int
    seed: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.info.device)

    @contextlib.contextmanager
    def engine(self) -> Iterator[Engine]:
        """The engine, open and warm for as long as it is measured: an idle one would slow the others (`apart`)."""
        opened = contenders.open_ours(self.options, self.stock if self.shares_weights else None)
        try:
            yield opened
        finally:
            opened.close()

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.stock.model.dtype
        return found

    def task(self, task: Task, new_tokens: int) -> Task:
        """The task as this family asks it, with a reply of just this length."""
        return resolve(task, self.info.family)._replace(decoding=contenders.exactly(new_tokens))


# -- requests -------------------------------------------------------------------------------------------------------


def sound(seconds: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Something like a voice: a gliding tone with two overtones that comes and goes, over noise; no two alike."""
    t = np.arange(round(seconds * RATE), dtype=np.float32) / RATE
    pitch, glide, pace = rng.uniform(90, 250), rng.uniform(-2, 2), rng.uniform(2, 5)
    phase = 2 * np.pi * (pitch * t + glide * t * t)
    voice = sum(np.sin(k * phase) / k for k in (1, 2, 3)) * np.clip(np.sin(2 * np.pi * pace * t), 0, 1)
    return (0.2 * voice + 0.02 * rng.standard_normal(len(t), dtype=np.float32)).astype(np.float32)


def draw(bench: Bench, mix: Mix, count: int, seed: int) -> list[Request]:
    """So many requests of one caption each."""
    rng = np.random.default_rng(seed)
    asked = [(rng.uniform(*mix.seconds), int(rng.integers(*mix.new_tokens, endpoint=True))) for _ in range(count)]
    return [Request(sound(seconds, rng), (bench.task(caption(), n),)) for seconds, n in asked]


def spread(requests: Sequence[Request], count: int) -> list[int]:
    """Indices of so many requests whose replies are of all lengths, in the order of arrival."""
    by_length = sorted(range(len(requests)), key=lambda index: contenders.asked_tokens(requests[index]))
    count = min(count, len(requests))
    return sorted(by_length[(2 * k + 1) * len(requests) // (2 * count)] for k in range(count))


# -- contenders side by side ----------------------------------------------------------------------------------------


def measure_mix(bench: Bench, name: str, count: int, count_alone: int) -> dict[str, Any]:
    """All contenders over one mix, in turns; the engine's books; and the floor."""
    requests = draw(bench, MIXES[name], count, bench.seed)
    chosen = spread(requests, count_alone)
    few = [requests[index] for index in chosen]
    # Other requests of the same kind: what is compiled, captured or allocated once is not what is measured.
    others = draw(bench, MIXES[name], max(contenders.BATCH_SIZE, bench.info.slots), bench.seed + 1)
    walls: dict[str, list[float]] = {way: [] for way in ("alone", "batches", "engine")}
    replies: dict[str, Tokens] = {}
    books: list[EngineStats] = []

    def measure(way: str, run: Callable[[Sequence[Request]], Tokens], asked: Sequence[Request]) -> None:
        began = time.perf_counter()
        replies[way] = run(asked)
        walls[way].append(time.perf_counter() - began)

    def measure_stock(
        way: str,
        run: Callable[[Loaded, Sequence[Request]], Tokens],
        warm: Sequence[Request],
        asked: Sequence[Request],
    ) -> None:
        settle(bench)
        run(bench.stock, warm)
        measure(way, functools.partial(run, bench.stock), asked)

    for _ in range(bench.repeat):
        apart(functools.partial(measure_stock, "alone", alone, others[:2], few))
        apart(functools.partial(measure_stock, "batches", batches, others[: contenders.BATCH_SIZE], requests))
        settle(bench)
        with bench.engine() as opened:
            contenders.engine(opened, others)
            opened.take_stats()
            measure("engine", functools.partial(contenders.engine, opened), requests)
            books.append(opened.take_stats())
            read = opened.submit(requests[0]).result()[0].prompt_tokens
    scale = len(requests) / len(few)
    walls["alone"] = [wall * scale for wall in walls["alone"]]
    found = {
        "mix": name,
        "requests": len(requests),
        "requests_alone": len(few),
        "audio_s": sum(len(request.samples) for request in requests) / RATE,
        "new_tokens": sum(map(contenders.asked_tokens, requests)),
        "walls_s": walls,
        "wall_s": {way: statistics.median(seconds) for way, seconds in walls.items()},
        "equal": {
            way: sum(replies[way][index] == reply for index, reply in zip(chosen, replies["alone"], strict=True))
            for way in ("batches", "engine")
        },
        "lengths_right": sum(
            len(reply) == contenders.asked_tokens(request)
            for reply, request in zip(replies["engine"], requests, strict=True)
        ),
    }
    found["shares"] = shares(books, walls["engine"])
    return {**found, "floor": floor(bench, requests, read, found["wall_s"]["engine"])}


def settle(bench: Bench) -> None:
    """What the last contender's caches hold is free again for the next one."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def shares(books: list[EngineStats], walls: list[float]) -> dict[str, float]:
    """Where the engine's wall time went, over all repeats; and how full its slots were."""
    wall_s, told = sum(walls), {name: sum(getattr(each, name) for each in books) for name in EngineStats._fields}
    found = {name.removesuffix("_s"): told[name] / wall_s for name in WORK}
    return {
        **found,
        "other": 1 - sum(found.values()),
        "occupancy": told["slot_steps"] / told["slot_capacity"] if told["slot_capacity"] else 0.0,
        "steps": told["steps"] / len(books),
    }


def floor(bench: Bench, requests: Sequence[Request], read: int, wall_s: float) -> dict[str, float]:
    """What hearing and reading takes at the rate of a matrix product; on a GPU with what decoding must read, too."""
    prompts = prompt_tokens(requests, read)
    work = flops.least_work([len(request.samples) for request in requests], prompts, bench.dims)
    settle(bench)
    ceiling = apart(lambda: ceilings.measure(bench.device, bench.dtype, bench.dims))
    settle(bench)
    compute_s = work.total / ceiling.flops
    slots, new_tokens = bench.info.slots, list(map(contenders.asked_tokens, requests))
    bytes_read = flops.decode_bytes(prompts, new_tokens, slots, bench.dims, bench.dtype.itemsize)
    # A small model's weights stay in a CPU's caches: there reading them is no floor.
    read_s = bytes_read / ceiling.bandwidth if bench.device.type == "cuda" else 0.0
    found = {**work._asdict(), "bytes": bytes_read, "flops_per_s": ceiling.flops, "bytes_per_s": ceiling.bandwidth}
    total_s = compute_s + read_s
    return {**found, "compute_s": compute_s, "read_s": read_s, "floor_s": total_s, "share": total_s / wall_s}


def prompt_tokens(requests: Sequence[Request], first: int) -> list[int]:
    """Length of every prompt, by that of the first: the text, which is the same for all, and its audio tokens."""
    heard = [sum(map(flops.audio_tokens, flops.window_frames(len(request.samples)))) for request in requests]
    return [first - heard[0] + tokens for tokens in heard]


# -- several tasks about one recording ------------------------------------------------------------------------------


def measure_tasks(bench: Bench, count: int, new_tokens: int, seconds: float = 60) -> dict[str, Any]:
    """Three tasks a recording beside one, in turns."""
    rng = np.random.default_rng(bench.seed + 2)
    tasks = tuple(bench.task(each, new_tokens) for each in (caption(), transcript(), answer("Is somebody speaking?")))
    heard = [sound(seconds, rng) for _ in range(count)]
    walls: dict[int, list[float]] = {1: [], 3: []}
    replies: dict[int, Tokens] = {}
    with bench.engine() as opened:
        contenders.engine(opened, [Request(sound(seconds, rng), tasks)])  # warm
        for _ in range(bench.repeat):
            for number, found in walls.items():
                began = time.perf_counter()
                replies[number] = contenders.engine(opened, (Request(samples, tasks[:number]) for samples in heard))
                found.append(time.perf_counter() - began)
    one_s, three_s = (statistics.median(walls[number]) for number in (1, 3))
    return {
        "recordings": count,
        "seconds": seconds,
        "new_tokens": new_tokens,
        "one_s": one_s,
        "three_s": three_s,
        "ratio": three_s / one_s,
        "equal": sum(one == three for one, three in zip(replies[1], replies[3], strict=True)),
    }


# -- report ---------------------------------------------------------------------------------------------------------


def table(heads: str, rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [" | ".join(map(str, row)) for row in (heads.split("|"), ["---"] * len(heads.split("|")), *rows)]
    return ["", *(f"| {line} |" for line in lines)]


def markdown(results: dict[str, Any]) -> str:
    """The tables, as docs/benchmarks.md shows them."""
    lines = [results["about"]]
    if mixes := results["mixes"]:
        heads = "mix|contender|requests|audio s|new tokens|wall s|audio s per s|tokens per s|alone / it|same as alone"
        lines += table(heads, [row for mix in mixes for row in contender_rows(mix)])
        heads = "mix|encode|prefill|decode|other|slots full|ceilings|floor s|floor / wall"
        lines += table(heads, [engine_row(mix) for mix in mixes])
    if python := results["python"]:
        told = f"A decoding step with all slots taken: {python['step_ms']:.2f} ms, of which Python takes"
        lines += ["", f"{told} {python['least']:.0%} to {python['most']:.0%}."]
    if results["tasks"]:
        heads = "recordings|seconds each|new tokens a task|1 task s|3 tasks s|3 tasks / 1 task|same reply"
        rows = [
            [
                *(each[key] for key in ("recordings", "seconds", "new_tokens")),
                f"{each['one_s']:.1f}",
                f"{each['three_s']:.1f}",
                f"{each['ratio']:.2f}",
                f"{each['equal']} of {each['recordings']}",
            ]
            for each in results["tasks"]
        ]
        lines += table(heads, rows)
    if grown := results["growth"]:
        lines += table("requests|resident MiB", [[f"{number:,}", f"{mib:.0f}"] for number, mib in grown["points"]])
        lines += ["", f"Slope after the first fifth: {grown['slope']:+.2f} MiB a thousand requests."]
    return "\n".join(lines) + "\n"


def contender_rows(mix: dict[str, Any]) -> list[list[str]]:
    rows = []
    for way, wall_s in mix["wall_s"].items():
        scaled = way == "alone" and mix["requests_alone"] < mix["requests"]
        compared = f"{mix['equal'][way]} of {mix['requests_alone']}" if way in mix["equal"] else ""
        rows.append(
            [
                mix["mix"],
                way,
                f"{mix['requests_alone']}, scaled to {mix['requests']}" if scaled else str(mix["requests"]),
                f"{mix['audio_s']:,.0f}",
                f"{mix['new_tokens']:,}",
                f"{wall_s:.1f}",
                f"{mix['audio_s'] / wall_s:.1f}",
                f"{mix['new_tokens'] / wall_s:.0f}",
                f"{mix['wall_s']['alone'] / wall_s:.2f}",
                compared,
            ]
        )
    return rows


def engine_row(mix: dict[str, Any]) -> list[str]:
    told, least = mix["shares"], mix["floor"]
    ceiling = [f"{least['flops_per_s'] / 1e9:,.0f} GFLOP/s"]
    ceiling += [f"{least['bytes_per_s'] / 1e9:,.0f} GB/s"] if least["read_s"] else []
    return [
        mix["mix"],
        *(f"{told[name]:.1%}" for name in ("encode", "prefill", "decode", "other", "occupancy")),
        ", ".join(ceiling),
        f"{least['floor_s']:.1f}",
        f"{least['share']:.0%}",
    ]


def about(bench: Bench, what: str) -> str:
    """What was measured, on what, how."""
    info = bench.info
    on = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    how = f"{what}, {info.dtype}, {info.device} ({on}), {info.slots} slots, medians of {bench.repeat}"
    return f"{machine.describe()}; {how}"


def differences(results: dict[str, Any]) -> list[str]:
    """What is wrong, if anything: one line a mix."""
    return [
        f"{mix['mix']}: of the engine's replies, {mix['equal']['engine']} of {mix['requests_alone']} are those of "
        f"`alone`, and {mix['lengths_right']} of {mix['requests']} are as long as asked"
        for mix in results["mixes"]
        if mix["equal"]["engine"] < mix["requests_alone"] or mix["lengths_right"] < mix["requests"]
    ]


# -- command --------------------------------------------------------------------------------------------------------


def open_bench(asked: argparse.Namespace) -> Bench:
    """Loads what is asked for: a checkpoint twice, or random weights of the released shape once."""
    if asked.shape:
        stock = contenders.random_model(contenders.released_shape(), "cuda", torch.bfloat16)
        options = EngineOptions("demo", device="cuda", slots=asked.slots)
    else:
        options = EngineOptions(asked.model, dtype=asked.dtype, device=asked.device, slots=asked.slots)
    opened = contenders.open_ours(options, stock if asked.shape else None)
    info = opened.info
    opened.close()
    if not asked.shape:
        stock = apart(lambda: contenders.load(asked.model, info.device, getattr(torch, info.dtype)))
    dims = flops.Dims.of(stock.model.config)
    return Bench(options, bool(asked.shape), info, stock, dims, asked.repeat, asked.seed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape", choices=["af3-7b"], help="random weights of this shape instead of a checkpoint")
    parser.add_argument("--mixes", nargs="*", choices=list(MIXES), help="none for none")
    parser.add_argument("--requests", type=int, default=200, help="of each mix")
    parser.add_argument("--alone", type=int, help="requests that `alone` is asked; all, if not said")
    parser.add_argument("--tasks", type=int, default=40, help="recordings of 60 s for 3 tasks beside 1; 0 for none")
    parser.add_argument("--growth", type=int, nargs="?", const=10_000, help="requests; nothing else is measured then")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--threads", type=int, help="of torch, for all contenders; its own choice, if not said")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Markdown; all figures go beside it as JSON")
    return parser.parse_args()


def main() -> None:
    asked = parse()
    if asked.shape and not torch.cuda.is_available():
        print(f"--shape {asked.shape} needs a CUDA device, and torch sees none here: nothing was measured")
        return
    if asked.threads:
        torch.set_num_threads(asked.threads)
    bench = open_bench(asked)
    results: dict[str, Any] = {"about": about(bench, asked.shape or asked.model), "mixes": [], "tasks": []}
    results.update(python=None, growth=None)
    print(results["about"], flush=True)

    def keep() -> None:
        if asked.out:
            asked.out.write_text(markdown(results))
            asked.out.with_suffix(".json").write_text(json.dumps(results, indent=1))

    if asked.growth:
        with bench.engine() as opened:
            results["growth"] = growth.measure(opened, asked.growth, asked.seed)._asdict()
    else:
        mixes = USUAL[asked.shape or "demo"] if asked.mixes is None else asked.mixes
        for name in mixes:
            results["mixes"].append(measure_mix(bench, name, asked.requests, asked.alone or asked.requests))
            keep()
            print(f"{name}: done", flush=True)
        for new_tokens in (8, 64) if asked.tasks else ():
            results["tasks"].append(measure_tasks(bench, asked.tasks, new_tokens))
        second = draw(bench, Mix((1, 1), (1, 1)), 1, bench.seed + 3)[0]
        with bench.engine() as opened:
            results["python"] = ceilings.python_share(opened, second)._asdict()
    keep()
    print(markdown(results))
    wrong = differences(results)
    print(*wrong, sep="\n")
    if wrong and bench.dtype == torch.float32:
        sys.exit(1)


if __name__ == "__main__":
    main()
