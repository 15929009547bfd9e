"""Measures memory and time of splitting hours of audio into segments; run by `python -m benchmarks.decode --memory`.

Each file is decoded in its own process, as in the pipeline with a decoder process, and split at the demo checkpoint's
maximum of 600 s; each segment is dropped when the next one comes. peak: maximum resident memory of both processes
together; before: the same after all imports and one second of decoding.
"""

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import soundfile

from benchmarks import machine
from benchmarks.memory import peak_mib
from tests import fixtures_audio as make

HOUR_S = 3600
_LOOP_S = 60


def wav(path: Path, seconds: int, rate: int, channels: int) -> None:
    """A header, and a hole where the audio would be."""
    header = make.wav(np.zeros((0, channels), np.float32), rate)
    size = seconds * rate * channels * 2
    if size + 36 >= 1 << 32:
        raise ValueError(f"{seconds} s are more than WAV can hold")
    with path.open("wb") as file:
        file.write(header[:4] + (size + 36).to_bytes(4, "little") + header[8:40] + size.to_bytes(4, "little"))
        file.truncate(44 + size)


def flac(path: Path, seconds: int, rate: int, channels: int) -> None:
    loop = make.sound(_LOOP_S, rate, channels)
    with soundfile.SoundFile(path, "w", rate, channels, "PCM_16", format="FLAC", compression_level=0) as file:
        for _ in range(seconds // _LOOP_S):
            file.write(loop)


def looped(container: str, encode: Callable[[make.Samples, int], bytes]) -> Callable[[Path, int, int, int], None]:
    """A minute encoded once, its packets written over and over."""

    def write(path: Path, seconds: int, rate: int, channels: int) -> None:
        minute = encode(make.sound(_LOOP_S, rate, channels), rate)
        with av.open(io.BytesIO(minute)) as source, av.open(str(path), "w", format=container) as file:
            audio = source.streams.audio[0]
            stream = file.add_stream_from_template(audio)
            packets = [packet for packet in source.demux(audio) if packet.size and (packet.pts or 0) >= 0]
            times = [(packet.pts, packet.duration) for packet in packets]
            length = times[-1][0] + times[-1][1] - times[0][0]
            for turn in range(seconds // _LOOP_S):
                for packet, (pts, duration) in zip(packets, times, strict=True):
                    packet.pts = packet.dts = pts + turn * length
                    packet.stream, packet.duration, packet.time_base = stream, duration, audio.time_base
                    file.mux(packet)  # which turns all three into what the container counts in

    return write


class Format(NamedTuple):
    """How a long file is written, and of what."""

    write: Callable[[Path, int, int, int], None]
    rate: int
    channels: int


FORMATS = {
    "wav 16 kHz mono": Format(wav, 16_000, 1),
    "wav 44.1 kHz stereo": Format(wav, 44_100, 2),
    "wav 96 kHz stereo": Format(wav, 96_000, 2),
    "flac 44.1 kHz stereo": Format(flac, 44_100, 2),
    "flac 96 kHz stereo": Format(flac, 96_000, 2),
    "mp3 44.1 kHz stereo": Format(looped("mp3", make.mp3), 44_100, 2),
    "m4a 44.1 kHz stereo": Format(looped("ipod", make.m4a), 44_100, 2),
    "opus 48 kHz stereo": Format(looped("ogg", make.webm), 48_000, 2),
}


def run(path: Path) -> dict[str, float]:
    """In a process of its own: one recording, front to back."""
    from af3pipe import storage
    from af3pipe.audio.guard import DecoderPool
    from af3pipe.audio.recording import read_segments
    from af3pipe.models import open_checkpoint
    from af3pipe.schemas import Recording, Segment

    limits = open_checkpoint("demo").limits
    warm = io.BytesIO(make.flac(make.sound(1, 44_100, 2), 44_100))
    with DecoderPool() as decoders:

        def segments(file: BinaryIO, name: str) -> Iterator[Segment]:
            recording = Recording(name, name)
            how = {"limits": limits, "open_decoding": decoders.open}
            return read_segments(file, recording, over_length="split", **how)

        assert list(segments(warm, "warm"))
        (decoder,) = machine.children()
        before, cpu = peak_mib() + peak_mib(decoder), machine.cpu_s()
        count, end_s = 0, 0.0
        with storage.open_input(str(path)) as file:
            for segment in segments(file, str(path)):
                count, end_s = count + 1, segment.end_s
                del segment
        return {
            "before": before,
            "peak": peak_mib() + peak_mib(decoder),
            "cpu_s": machine.cpu_s() - cpu,
            "segments": count,
            "audio_s": end_s,
        }


def show(hours: list[float]) -> None:
    heads = f"{'before MiB':>12}{'peak MiB':>10}{'above MiB':>11}{'CPU s':>8}{'CPU s an hour':>15}"
    print(f"{'':22}{'hours':>6}{'segments':>10}{heads}")
    for name, form in FORMATS.items():
        for length in hours:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "recording"
                form.write(path, round(length * HOUR_S), form.rate, form.channels)
                command = [sys.executable, "-m", "benchmarks.decode_memory", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            audio_h = found["audio_s"] / HOUR_S
            row = f"{name:22}{audio_h:6.2f}{found['segments']:10}{found['before']:12.0f}{found['peak']:10.0f}"
            row += f"{found['peak'] - found['before']:11.0f}{found['cpu_s']:8.1f}{found['cpu_s'] / audio_h:15.1f}"
            print(row, flush=True)


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))
