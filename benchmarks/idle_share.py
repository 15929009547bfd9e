"""How long the engine waits for audio: its idle share over many recordings, beside the plain way to feed it.

    python -m benchmarks.idle_share [--recordings 200] [--repeat 3] [--engine constant|transformers|both]

Real files (stereo FLAC at 44.1 kHz, 2 to 20 s), real decoding, Beam's in-process runner. `overlap` is this
package's DecodeAudio and AskAudioFlamingo; `plain` decodes in one DoFn and asks a batch at a time in the next,
waiting for it there. The idle share is the engine's own: waiting / (waiting + working), from its first request on.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apache_beam as beam
import numpy as np
import soundfile

from af3pipe import storage
from af3pipe.models import EngineOptions, acquire_engine, caption, open_checkpoint, release_engine, resolve
from af3pipe.schemas import Recording, Request
from af3pipe.transforms import AnswerRecordings, AskAudioFlamingo, DecodeAudio, ReadRecordings
from af3pipe.transforms.decode import open_segments
from benchmarks import constant_engine, machine

BATCH_SIZE = 16
TASK = caption(max_new_tokens=16)


def make_recordings(folder: Path, count: int) -> float:
    """Writes the files, and gives their length in seconds."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(2, 20, count)
    noise = (rng.standard_normal((44_100 * 20, 2)) * 2000).astype(np.int16)
    for number, seconds in enumerate(lengths):
        soundfile.write(folder / f"{number:04}.flac", noise[: int(44_100 * seconds)], 44_100)
    return float(lengths.sum())


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


def decode_plainly(recording: Recording, limits) -> list:
    return list(open_segments(recording, limits=limits))


def run(folder: Path, engine: str, way: str) -> tuple[float, float]:
    """One run: wall seconds, and the engine's idle share."""
    options = EngineOptions("demo", engine, device="cpu", batch_size=BATCH_SIZE)
    held = acquire_engine(options)  # loading the model is not what is measured
    held.take_stats()
    taken = []
    take, held.take_stats = held.take_stats, lambda: taken.append(take()) or taken[-1]
    began = time.perf_counter()
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        recordings = pipeline | ReadRecordings(str(folder))
        if way == "overlap":
            ask = AskAudioFlamingo(model="demo", tasks=[TASK], engine=engine, device="cpu", batch_size=BATCH_SIZE)
            _ = recordings | AnswerRecordings(DecodeAudio(model="demo"), ask)
        else:
            limits = open_checkpoint("demo").limits
            _ = recordings.good | beam.FlatMap(decode_plainly, limits) | beam.ParDo(AskPlainly(options))
    wall_s = time.perf_counter() - began
    held.take_stats()
    release_engine(options)
    idle_s = sum(stats.idle_s for stats in taken)
    busy_s = sum(stats.encode_s + stats.prefill_s + stats.decode_s for stats in taken)
    return wall_s, idle_s / (idle_s + busy_s)


@contextmanager
def latency(seconds: float) -> Iterator[None]:
    """Every object takes a while to open, as it does in a store."""
    opened: Callable = storage.open_input

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return opened(*args, **kwargs)

    storage.open_input = slow
    try:
        yield
    finally:
        storage.open_input = opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--engine", choices=["constant", "transformers", "both"], default="both")
    asked = parser.parse_args()
    constant = constant_engine.register()
    cases = [(constant, 0.0), (constant, 0.05)] if asked.engine != "transformers" else []
    cases += [("transformers", 0.0)] if asked.engine != "constant" else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audio_s = make_recordings(folder, asked.recordings)
        print(machine.describe())
        print(f"{asked.recordings} recordings, {audio_s:.0f} s of audio; medians of {asked.repeat}")
        print(f"{'engine':14}{'store':>8}{'way':>10}{'wall s':>9}{'audio s/s':>11}{'idle share':>12}")
        for engine, latency_s in cases:
            found: dict[str, list[tuple[float, float]]] = {"plain": [], "overlap": []}
            for _ in range(asked.repeat):  # in turns, so that a busy moment of the machine is shared
                for way, figures in found.items():
                    with latency(latency_s):
                        figures.append(run(folder, engine, way))
            store = f"{latency_s * 1000:.0f} ms"
            walls = {}
            for way, figures in found.items():
                wall_s, idle = (statistics.median(each) for each in zip(*figures, strict=True))
                walls[way] = wall_s
                print(f"{engine:14}{store:>8}{way:>10}{wall_s:9.1f}{audio_s / wall_s:11.1f}{idle:12.1%}")
            print(f"{'':22}{'ratio':>10}{walls['plain'] / walls['overlap']:9.2f}", flush=True)


if __name__ == "__main__":
    main()
