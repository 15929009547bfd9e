"""Measures the cost of decoding in a separate process; run by `python -m benchmarks.decode --guard`.

It decodes recordings on a disk to segments as the pipeline does, in process and guarded, in turns, pinned to one
core, and measures CPU seconds of both processes. With more cores, the guarded process also runs in parallel to the
worker.
"""

import statistics
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from af3pipe import storage
from af3pipe.audio.decode import open_decoding
from af3pipe.audio.decoding import Asked, Decoding, OpenDecoding
from af3pipe.audio.guard import DecoderPool
from af3pipe.audio.recording import read_segments
from af3pipe.models import open_checkpoint
from af3pipe.schemas import Recording
from benchmarks import machine
from tests import fixtures_audio as make

FORMATS = {"wav": make.wav, "flac": make.flac, "mp3": make.mp3, "ogg vorbis": make.ogg, "m4a": make.m4a}
LENGTHS_S = (5, 30, 300)
RATE = 44_100
ROUND_S = 300


def decode_all(paths: list[Path], open_: OpenDecoding) -> float:
    """CPU seconds."""
    limits = open_checkpoint("demo").limits
    began = machine.cpu_s()
    for path in paths:
        recording = Recording(str(path), str(path))
        with storage.open_input(str(path)) as file:
            for _ in read_segments(file, recording, limits=limits, over_length="split", open_decoding=open_):
                pass
    return machine.cpu_s() - began


def show(repeat: int) -> None:
    print(f"{'':12}{'seconds':>8}{'in process':>14}{'guarded':>14}{'more':>8}    CPU ms a recording")
    with DecoderPool() as decoders:

        def guarded(file: BinaryIO, asked: Asked) -> AbstractContextManager[Decoding]:
            return decoders.open(file, asked)

        for name, encode in FORMATS.items():
            for seconds in LENGTHS_S:
                with tempfile.TemporaryDirectory() as folder:
                    count = max(ROUND_S // seconds, 1)
                    path = Path(folder) / "recording"
                    path.write_bytes(encode(make.sound(seconds, RATE, 2), RATE))
                    ways = {"ours": open_decoding, "guarded": guarded}
                    found: dict[str, list[float]] = {way: [] for way in ways}
                    for turn in range(repeat + 1):
                        for way, open_ in ways.items():
                            spent = decode_all([path] * count, open_)
                            if turn:  # the first is to warm up
                                found[way].append(1000 * spent / count)
                inside, outside = (statistics.median(spent) for spent in found.values())
                row = f"{name:12}{seconds:8}{inside:14.2f}{outside:14.2f}{outside / inside - 1:8.1%}"
                print(row, flush=True)
