"""Remake the demo's derived recordings from the sample FLACs.

    python tools/make_demo_clips.py            # writes into af3pipe/demo/clips
    python tools/make_demo_clips.py --out DIR  # writes somewhere else, to look first

Most clips are samples as they were rendered and are only kept in af3pipe/demo/clips. The five made here are an
MP3, a stereo file at 44.1 kHz, a recording of two windows, one whose name has spaces and umlauts, and one
that is broken. Encoders differ from version to version, so the bytes may differ; the sound does not.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

ROOT = Path(__file__).resolve().parent.parent
CLIPS = ROOT / "af3pipe" / "demo" / "clips"
SAMPLES = ROOT / "tools" / "demo_checkpoint" / "samples"

STEREO_RATE = 44_100
DELAY_FRAMES = 9  # 0.2 ms at 44.1 kHz: two microphones some 7 cm apart
TWO_WINDOWS_S = 33  # longer than one 30 s window, shorter than two


def mp3(source: Path, target: Path) -> None:
    """Encode a sample as MP3."""
    pcm, rate = sf.read(source, dtype="float32")
    sf.write(target, pcm, rate, format="MP3", subtype="MPEG_LAYER_III")


def stereo(source: Path, target: Path) -> None:
    """Resample to 44.1 kHz and give the right channel a lower level and a small delay."""
    pcm, rate = sf.read(source, dtype="float32")
    left = soxr.resample(pcm, rate, STEREO_RATE)
    right = 0.85 * np.concatenate([np.zeros(DELAY_FRAMES, np.float32), left[:-DELAY_FRAMES]])
    sf.write(target, np.stack([left, right], axis=1), STEREO_RATE, subtype="PCM_16")


def two_windows(source: Path, target: Path) -> None:
    """Repeat a sound until the encoder needs a second window for it."""
    pcm, rate = sf.read(source, dtype="float32")
    frames = TWO_WINDOWS_S * rate
    sf.write(target, np.tile(pcm, -(-frames // len(pcm)))[:frames], rate, subtype="PCM_16")


def corrupt(source: Path, target: Path) -> None:
    """Keep a sound header, overwrite the middle with nonsense and cut the end off."""
    data = bytearray(source.read_bytes())
    third = len(data) // 3
    data[third : third + 4096] = bytes(range(256)) * 16
    target.write_bytes(data[: 2 * third])


def main() -> None:
    parser = argparse.ArgumentParser(description="Remake the demo's derived recordings.")
    parser.add_argument("--out", type=Path, default=CLIPS, help="where to write (default: the demo's clips)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    mp3(SAMPLES / "digits_four_zero_two_nine.flac", out / "digits_four_zero_two_nine.mp3")
    stereo(SAMPLES / "command_go_back_home.flac", out / "command_go_back_home_stereo.flac")
    two_windows(CLIPS / "siren.flac", out / "siren_two_windows.flac")
    corrupt(SAMPLES / "digits_four_zero_two_nine.flac", out / "corrupt.flac")
    umlauts = CLIPS / "zwei hohe Töne.flac"  # a sample as it is: two short high beeps
    if out.resolve() != CLIPS:
        shutil.copyfile(umlauts, out / umlauts.name)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size:9,}  {path.name}")


if __name__ == "__main__":
    main()
