"""Compares decoding a thousand parts of one long file with decoding the file once.

    python -m benchmarks.parts [--hours 4] [--parts 1000] [--repeat 1] [--formats "flac 16 kHz mono" ...]

It decodes as the pipeline does, in a decoder process, split at the demo checkpoint's maximum, from the disk and from
an S3 server on this machine (`benchmarks.synthetic_s3`), whose GET requests are counted. `once`: the file as one
recording. `parts`: as many consecutive parts, together the whole file. `overlapping`: as many, each twice as long, so
that each second belongs to two. Each is measured in its own process, in turns; results are medians of CPU and wall
seconds; a ratio is of CPU seconds, to `once` of the same row. If the file's sampling rate is not the model's, each
part has its own resampler, so `overlapping` resamples all of it twice.
"""

import argparse
import io
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import decode_memory, machine, synthetic_s3
from tests import fixtures_audio as make

HOUR_S = 3600
WAYS = ("once", "parts", "overlapping")
_MP3 = decode_memory.looped("mp3", make.mp3)
FORMATS = {
    "wav 16 kHz mono": decode_memory.Format(decode_memory.wav, 16_000, 1),
    "flac 16 kHz mono": decode_memory.Format(decode_memory.flac, 16_000, 1),
    "mp3 16 kHz mono": decode_memory.Format(_MP3, 16_000, 1),
    "wav 44.1 kHz stereo": decode_memory.Format(decode_memory.wav, 44_100, 2),
    "flac 44.1 kHz stereo": decode_memory.Format(decode_memory.flac, 44_100, 2),
    "mp3 44.1 kHz stereo": decode_memory.Format(_MP3, 44_100, 2),
}


def run(uri: str, size_bytes: int, seconds: float, parts: int, way: str) -> dict[str, float]:
    """In a process of its own: one pass over the file."""
    from af3pipe import storage
    from af3pipe.audio.guard import DecoderPool
    from af3pipe.audio.recording import read_parts
    from af3pipe.models import open_checkpoint
    from af3pipe.schemas import Recording, Rejected

    step_s = seconds / parts
    length_s = {"once": None, "parts": step_s, "overlapping": 2 * step_s}[way]
    wanted = [
        Recording(str(index), uri, offset_s=index * step_s, duration_s=length_s)
        for index in range(1 if way == "once" else parts)
    ]
    limits = open_checkpoint("demo").limits
    with DecoderPool() as decoders:

        def read(file: io.BufferedIOBase, recordings: list[Recording]) -> float:
            audio_s = 0.0
            for _, outcome in read_parts(
                file, recordings, limits=limits, over_length="split", open_decoding=decoders.open
            ):
                if isinstance(outcome, Rejected):
                    raise outcome
                audio_s += outcome.audio_s
                del outcome
            return audio_s

        warm = make.flac(make.sound(1, 44_100, 2), 44_100)
        assert read(io.BytesIO(warm), [Recording("warm", "warm")])
        with storage.open_input(uri, size_bytes=size_bytes) as file:
            file.read(1)  # the store's client is loaded
            file.seek(0)
            cpu, wall = machine.cpu_s(), time.perf_counter()
            audio_s = read(file, wanted)
            return {
                "cpu_s": machine.cpu_s() - cpu,
                "wall_s": time.perf_counter() - wall,
                "audio_s": audio_s,
                "peak_mib": decode_memory.peak_mib(),
            }


def measure(path: Path, seconds: float, parts: int, repeat: int) -> dict[tuple[str, str], dict[str, float]]:
    """Medians by place and way."""
    bucket = synthetic_s3.Bucket(1, 0)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body,
        synthetic_s3.serving(bucket) as (url, server),
    ):
        bucket.body = body
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for _ in range(repeat):
            for place, uri in (("local", str(path)), ("S3", f"s3://synthetic/{bucket.key(0)}")):
                for way in WAYS:
                    before = server.requests["get"]
                    asked = json.dumps([uri, path.stat().st_size, seconds, parts, way])
                    command = [sys.executable, "-m", "benchmarks.parts", "--one", asked]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                    result = json.loads(done.stdout.splitlines()[-1])
                    result["requests"] = server.requests["get"] - before
                    found.setdefault((place, way), []).append(result)
        bucket.body = b""
    return {
        key: {name: statistics.median(result[name] for result in results) for name in results[0]}
        for key, results in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run(*json.loads(given.one))))
        return
    seconds = round(given.hours * 60) * 60
    print(f"{machine.describe()}; {seconds / HOUR_S:g} hours, {given.parts} parts, medians of {given.repeat}")
    heads = "".join(f"{head:>10}" for head in ("CPU s", "ratio", "wall s", "ratio", "audio h", "GETs", "peak MiB"))
    print(f"{'':22}{'':7}{'':12}{heads}")
    for name in given.formats:
        form = FORMATS[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recording"
            form.write(path, seconds, form.rate, form.channels)
            found = measure(path, seconds, given.parts, given.repeat)
        for (place, way), result in found.items():
            once = found[place, "once"]
            cells = f"{result['cpu_s']:10.1f}{result['cpu_s'] / once['cpu_s']:10.2f}"
            cells += f"{result['wall_s']:10.1f}{result['wall_s'] / once['wall_s']:10.2f}"
            cells += f"{result['audio_s'] / HOUR_S:10.2f}{result['requests']:10.0f}{result['peak_mib']:10.0f}"
            print(f"{name:22}{place:7}{way:12}{cells}", flush=True)


if __name__ == "__main__":
    main()
