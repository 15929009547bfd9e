"""Measures decoding to 16 kHz mono on one core, beside other libraries: seconds of audio per second, and memory.

    python -m benchmarks.decode [--seconds 600] [--repeat 5] [--formats flac mp3 ...]
    python -m benchmarks.decode --memory [--hours 1 3]
    python -m benchmarks.decode --guard

Each method returns all samples of a file, as one float32 array or as blocks of one. Methods run in turns, pinned to
one core together with the processes they start; results are medians. `guarded`: in a decoder process, as the pipeline
decodes. `librosa`: soundfile and soxr; blank if soundfile cannot read the format. `pyav`: FFmpeg's decoder and
resampler, used plainly. CPU seconds are those of all processes of a method.
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import librosa
import numpy as np
import soundfile

from af3pipe import storage
from af3pipe.audio.decode import decode
from af3pipe.audio.decoding import Asked
from af3pipe.audio.guard import DecoderPool
from benchmarks import decode_guard, decode_memory, machine
from tests import fixtures_audio as make

RATE = 16_000
Decoded = list[np.ndarray]
DECODERS = DecoderPool()
_LOOP_S = 60


class Format(NamedTuple):
    """How a file is made."""

    make: Callable[[make.Samples, int], bytes]
    rate: int = 44_100
    channels: int = 2


FORMATS = {
    "wav 16 kHz mono": Format(make.wav, RATE, 1),
    "wav": Format(make.wav),
    "wav 48 kHz": Format(make.wav, 48_000),
    "wav 24 bit": Format(lambda samples, rate: make.wav(samples, rate, "PCM_24")),
    "aiff": Format(make.aiff),
    "flac": Format(make.flac),
    "flac 48 kHz": Format(make.flac, 48_000),
    "mp3": Format(make.mp3),
    "ogg vorbis": Format(make.ogg),
    "ogg opus": Format(lambda samples, rate: make.ogg(samples, rate, "OPUS"), 48_000),
    "m4a": Format(make.m4a),
    "adts": Format(make.adts),
    "webm": Format(make.webm, 48_000),
    "wav gsm 8 kHz": Format(lambda samples, rate: make.wav(samples, rate, "GSM610"), 8000, 1),
}


def ours(path: Path) -> Decoded:
    with storage.open_input(str(path)) as file:
        return list(decode(file, sample_rate=RATE))


def guarded(path: Path) -> Decoded:
    """In a decoder process, as the pipeline decodes; one process for all files."""
    with storage.open_input(str(path)) as file, DECODERS.open(file, Asked(RATE)) as decoding:
        return [block.copy() for block in decoding.blocks()]


def with_librosa(path: Path) -> Decoded | None:
    try:
        if not soundfile.SoundFile(path).seekable():
            return None  # GSM, for one: librosa raises
    except soundfile.LibsndfileError:
        return None  # librosa would go on with audioread, which needs programs beside it
    return [librosa.load(path, sr=RATE, mono=True)[0]]


def with_pyav(path: Path) -> Decoded:
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
    with av.open(str(path)) as container:
        parts = [out.to_ndarray()[0] for frame in container.decode(audio=0) for out in resampler.resample(frame)]
    return parts + [out.to_ndarray()[0] for out in resampler.resample(None)]


def with_torchcodec(path: Path) -> Decoded:
    from torchcodec.decoders import AudioDecoder

    return [AudioDecoder(path, sample_rate=RATE, num_channels=1).get_all_samples().data[0].numpy()]


# A way is one line here; it gives None for a format that it does not read.
WAYS: dict[str, Callable[[Path], Decoded | None]] = {
    "ours": ours,
    "guarded": guarded,
    "librosa": with_librosa,
    "pyav": with_pyav,
}


def _torchcodec_loads() -> bool:
    """It needs shared libraries of FFmpeg and its own build of torch."""
    if importlib.util.find_spec("torchcodec") is None:
        return False
    try:
        from torchcodec.decoders import AudioDecoder  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


class Speed(NamedTuple):
    """Seconds of audio a second."""

    cpu: float
    wall: float


def pin() -> str:
    """Keeps this process, and all that it will start, on one core; as words for the heading."""
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned to a core, which this system cannot"
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return "pinned to one core"


def measure(path: Path, seconds: float, repeat: int) -> dict[str, Speed | None]:
    """The medians of each way, taken in turns; each is run once before."""
    found: dict[str, list[Speed]] = {}
    for way, load in WAYS.items():
        samples = load(path)
        if samples is not None:
            found[way] = []
            found_s = sum(map(len, samples)) / RATE
            if abs(found_s - seconds) > 1:
                raise ValueError(f"{way} found {found_s:.1f} s of {seconds} s in {path.name}")
        del samples
    for _ in range(repeat):
        for way, speeds in found.items():
            cpu, wall = machine.cpu_s(), time.perf_counter()
            WAYS[way](path)
            speeds.append(Speed(seconds / (machine.cpu_s() - cpu), seconds / (time.perf_counter() - wall)))
    medians = {way: Speed(*map(statistics.median, zip(*speeds, strict=True))) for way, speeds in found.items()}
    return {way: medians.get(way) for way in WAYS}


def make_file(form: Format, seconds: int) -> bytes:
    """A minute of sound, over and over."""
    loop = make.sound(min(_LOOP_S, seconds), form.rate, form.channels)
    return form.make(np.tile(loop, (-(-seconds // _LOOP_S), 1))[: seconds * form.rate], form.rate)


def row(name: str, speeds: dict[str, Speed | None]) -> str:
    cells = "".join(f"{speed.cpu:10.0f}{speed.wall:7.0f}" if speed else " " * 17 for speed in speeds.values())
    reference = speeds["librosa"]
    for way in ("ours", "guarded"):
        speed = speeds.get(way)
        if speed and reference:
            cells += f"{speed.cpu / reference.cpu:19.2f}"
    return f"{name:18}{cells}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--memory", action="store_true", help="peak memory and time of cutting long recordings")
    parser.add_argument("--guard", action="store_true", help="what decoding in a process of its own costs")
    parser.add_argument("--hours", type=float, nargs="+", default=[1, 3], help="with --memory")
    asked = parser.parse_args()
    print(machine.describe())
    if asked.memory:
        decode_memory.show(asked.hours)
        return
    if asked.guard:
        print(f"44.1 kHz stereo; {pin()}; medians of {asked.repeat}")
        decode_guard.show(asked.repeat)
        return
    if _torchcodec_loads():
        WAYS["torchcodec"] = with_torchcodec
    print(f"{asked.seconds} s of audio a file, 44.1 kHz stereo if not said; {pin()}; medians of {asked.repeat}")
    print("seconds of audio per CPU second and per second; ratios are of CPU seconds")
    heads = "".join(f"{way:>10}{'wall':>7}" for way in WAYS)
    print(f"{'':18}{heads}" + "".join(f"{way + ' / librosa':>19}" for way in ("ours", "guarded") if way in WAYS))
    for name in asked.formats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recording"
            path.write_bytes(make_file(FORMATS[name], asked.seconds))
            print(row(name, measure(path, asked.seconds, asked.repeat)), flush=True)


if __name__ == "__main__":
    main()
