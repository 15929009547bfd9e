"""Measures how long the engine waits for audio, and compares it with a plain pipeline.

    python -m benchmarks.idle_share [--recordings 200] [--repeat 3] [--engine constant|transformers|both]

It uses real files (stereo FLAC at 44.1 kHz, 2 to 20 s), real decoding and Beam's in-process runner. `overlap` is this
package's AnswerRecordings; `plain` decodes in one DoFn and processes one batch at a time in the next, waiting for it;
`decode` has no engine, and so shows the fastest possible decoding.

idle: share of the time from the first request to the last reply in which the engine waited for requests.
not busy: share of that time in which the engine did not work: idle, or its thread was not scheduled.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import soundfile

from af3pipe.models import EngineOptions, acquire_engine, caption, open_checkpoint, release_engine, resolve
from af3pipe.models.engine import Engine
from af3pipe.schemas import AudioObject, Request
from af3pipe.transforms import AnswerRecordings, AskAudioFlamingo, DecodeAudio, ReadRecordings, metrics
from af3pipe.transforms.decode import open_segments
from benchmarks import constant_engine, machine, slow_store

BATCH_SIZE = 16
TASK = caption(max_new_tokens=16)
WAYS = ("plain", "overlap")
WORK = ("encode_ms", "prefill_ms", "decode_ms")


class Figures(NamedTuple):
    """One run; the shares are None where no engine was asked."""

    wall_s: float
    idle: float | None = None
    not_busy: float | None = None


class Case(NamedTuple):
    """What is run: an engine, how long one of its windows takes (None: as long as it takes), and the store."""

    engine: str
    window_s: float | None
    latency_s: float


def make_recordings(folder: Path, count: int, longest_s: float = 20) -> float:
    """Writes the files, and gives their length in seconds."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(2, longest_s, count)
    noise = (rng.standard_normal((int(44_100 * longest_s), 2)) * 2000).astype(np.int16)
    for number, seconds in enumerate(lengths):
        soundfile.write(folder / f"{number:04}.flac", noise[: int(44_100 * seconds)], 44_100)
    return float(lengths.sum())


class Span:
    """From an engine's first request to its last reply, and what it says it did meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._submit = engine.submit
        self._began: float | None = None
        self._ended = 0.0
        engine.take_stats()  # what was before is not ours
        engine.submit = self._watch  # type: ignore[method-assign]

    def _watch(self, request: Request) -> Any:
        if self._began is None:
            self._began = time.perf_counter()
        future = self._submit(request)
        future.add_done_callback(self._end)
        return future

    def _end(self, future: Any) -> None:
        self._ended = time.perf_counter()

    def shares(self, told: dict[str, float]) -> tuple[float, float]:
        """The engine's idle share, and all of its time but what it worked.

        Args:
            told: Seconds by Beam counter (`idle_ms`, ...); none where nobody has asked the engine yet.
        """
        del self._engine.submit  # the class has its own
        span_s = self._ended - (self._began or 0.0)
        left = self._engine.take_stats()
        idle_s = told.get("idle_ms", 0.0) + left.idle_s
        busy_s = sum(told.get(name, 0.0) for name in WORK) + left.encode_s + left.prefill_s + left.decode_s
        return idle_s / span_s, 1 - busy_s / span_s


class AskPlainly(beam.DoFn):
    """What most pipelines do: gather a batch, ask, wait, go on."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options

    def setup(self) -> None:
        self._engine = acquire_engine(self._options)

    def start_bundle(self) -> None:
        self._batch: list = []

    def process(self, segment):
        self._batch.append(segment)
        if len(self._batch) == BATCH_SIZE:
            self._ask()

    def finish_bundle(self) -> None:
        self._ask()

    def teardown(self) -> None:
        release_engine(self._options)

    def _ask(self) -> None:
        task = resolve(TASK, self._engine.info.family)
        futures = [self._engine.submit(Request(segment.samples, (task,))) for segment in self._batch]
        for future in futures:
            future.result()
        self._batch = []


def decode_plainly(found: AudioObject, limits) -> list:
    return [segment for recording in found.recordings for segment in open_segments(recording, limits=limits)]


def lay(pipeline: beam.Pipeline, url: str, options: EngineOptions, way: str) -> None:
    """The pipeline of one way."""
    objects = pipeline | ReadRecordings(url)
    decode = DecodeAudio(model="demo")
    if way == "decode":
        _ = objects | decode
    elif way == "overlap":
        ask = AskAudioFlamingo(model="demo", tasks=[TASK], engine=options.engine, device="cpu", slots=BATCH_SIZE)
        _ = objects | AnswerRecordings(decode=decode, ask=ask)
    else:
        limits = open_checkpoint("demo").limits
        _ = objects | beam.FlatMap(decode_plainly, limits) | beam.ParDo(AskPlainly(options))


def run(url: str, engine: str, way: str) -> Figures:
    """One run."""
    options = EngineOptions("demo", engine, device="cpu", slots=BATCH_SIZE)
    held = acquire_engine(options)  # loading the model is not what is measured
    span = Span(held)
    began = time.perf_counter()
    pipeline = beam.Pipeline(runner="FnApiRunner")
    lay(pipeline, url, options, way)
    result = pipeline.run()
    result.wait_until_finish()
    wall_s = time.perf_counter() - began
    shares = () if way == "decode" else span.shares(told_s(result))
    release_engine(options)
    return Figures(wall_s, *shares)


def told_s(result: Any) -> dict[str, float]:
    """What Beam's counters of this package say, in seconds."""
    counters = result.metrics().query()["counters"]
    ours = [counter.key.metric.name for counter in counters if counter.key.metric.namespace == metrics.NAMESPACE]
    values = [counter.result for counter in counters if counter.key.metric.namespace == metrics.NAMESPACE]
    return {name: value / 1000 for name, value in zip(ours, values, strict=True) if name.endswith("_ms")}


def medians(found: list[Figures]) -> Figures:
    columns = [[value for value in column if value is not None] for column in zip(*found, strict=True)]
    return Figures(*(statistics.median(column) if column else None for column in columns))


def measure(folder: Path, case: Case, repeat: int, ways: tuple[str, ...]) -> dict[str, Figures]:
    """The medians of each way, taken in turns, so that a busy moment of the machine is shared."""
    constant_engine.window_s = case.window_s or constant_engine.window_s
    slow_store.latency_s = case.latency_s
    url = f"slow://{folder}" if case.latency_s else str(folder)
    found: dict[str, list[Figures]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way in ways:
            found[way].append(run(url, case.engine, way))
    return {way: medians(figures) for way, figures in found.items()}


def show(case: Case, found: dict[str, Figures], audio_s: float) -> None:
    window = "" if case.window_s is None else f"{case.window_s * 1000:.0f} ms"
    for way, figures in found.items():
        engine = "none" if way == "decode" else case.engine
        row = f"{engine:14}{window:>8}{case.latency_s * 1000:5.0f} ms{way:>9}"
        row += f"{figures.wall_s:8.1f}{audio_s / figures.wall_s:11.0f}"
        row += "".join(f"{share:10.1%}" for share in figures[1:] if share is not None)
        if way == "overlap":
            row += f"{found['plain'].wall_s / figures.wall_s:10.2f}"
        print(row, flush=True)


def cases(engine: str, windows_ms: list[float]) -> list[Case]:
    constant = constant_engine.register()
    found = [Case(constant, window / 1000, latency_s) for window in windows_ms for latency_s in (0.0, 0.05)]
    return [
        *(found if engine != "transformers" else []),
        *([Case("transformers", None, 0.0)] if engine != "constant" else []),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--engine", choices=["constant", "transformers", "both"], default="both")
    parser.add_argument("--window-ms", type=float, nargs="+", default=[40.0], help="of the constant engine")
    asked = parser.parse_args()
    slow_store.register()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audio_s = make_recordings(folder, asked.recordings)
        print(machine.describe())
        print(f"{asked.recordings} recordings, {audio_s:.0f} s of audio; medians of {asked.repeat}")
        heads = f"{'engine':14}{'window':>8}{'store':>8}{'way':>9}{'wall s':>8}{'audio s/s':>11}"
        print(f"{heads}{'idle':>10}{'not busy':>10}{'speed-up':>10}")
        asking = cases(asked.engine, asked.window_ms)
        for latency_s in sorted({case.latency_s for case in asking}):
            case = Case(asking[0].engine, None, latency_s)
            show(case, measure(folder, case, asked.repeat, ("decode",)), audio_s)
        for case in asking:
            show(case, measure(folder, case, asked.repeat, WAYS), audio_s)


if __name__ == "__main__":
    main()
