"""Render the bank of spoken words and phrases: many synthetic voices, 16 kHz, 16 bit.

python bank.py --out DIR             espeak-ng and flite, into DIR/bank.pkl
python bank.py --out DIR --neural    hibari, into DIR/bank_neural.pkl
"""

import argparse
import io
import pickle
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile as sf
import soxr
from vocabulary import DIGITS, WORDS

SAMPLE_RATE = 16_000
ESPEAK_ACCENTS = ("en-us",) * 4 + ("en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029")
_VARIANTS = """
f1 f2 f3 f4 f5 m1 m2 m3 m4 m5 m6 m7 m8 Alex Alicia Andrea Annie belinda benjamin david ed Gene linda Mike paul rob
steph klatt klatt4 anika travis shelby
"""
ESPEAK_VARIANTS = ("", *(f"+{name}" for name in _VARIANTS.split()))
FLITE_PITCH_HZ = {"kal16": 105, "awb": 120, "rms": 110, "slt": 180}
FLITE_SETTINGS = [
    (voice, stretch, FLITE_PITCH_HZ[voice] + shift)
    for voice in FLITE_PITCH_HZ
    for stretch in (0.85, 1.0, 1.25)
    for shift in (-15, 0, 20)
]


class Utterance(NamedTuple):
    """One rendering: `kind` is "w" for a single word, "p" for a phrase; `pcm` is 16 kHz mono int16."""

    kind: str
    text: str
    voice: str
    pcm: np.ndarray


class _Job(NamedTuple):
    kind: str
    render: Callable[[str, Any], np.ndarray | None]
    text: str
    setting: tuple


@dataclass
class Bank:
    """The utterances in the form the samples are drawn from.

    Attributes:
        words: The renderings of a word by a voice: (voice, word) -> list of int16 arrays.
        phrases: Whole phrases, hibari's twice.
        voices: Voices that have most of the words; a voice that stands there more often is drawn more often.
        humans: Voices added by `add_humans`.
    """

    words: dict[tuple[str, str], list[np.ndarray]]
    phrases: list[Utterance]
    voices: list[str]
    humans: list[str] = field(default_factory=list)


def to_bank_pcm(pcm: np.ndarray, rate: int) -> np.ndarray | None:
    """Mix to mono, resample, trim the silence around, set the peak to 0.7; None if nothing is to be heard."""
    if pcm.ndim > 1:
        pcm = pcm.mean(1)
    if rate != SAMPLE_RATE:
        pcm = soxr.resample(pcm, rate, SAMPLE_RATE)
    level = np.abs(pcm)
    heard = np.where(level > (0.01 * level.max() if pcm.size else 0))[0]
    if not len(heard):
        return None
    pcm = pcm[max(0, heard[0] - 200) : heard[-1] + 400]
    return (pcm / (np.abs(pcm).max() + 1e-9) * 0.7 * 32767).astype(np.int16)


def espeak(text: str, setting: tuple[str, int, int]) -> np.ndarray | None:
    """Speak with espeak-ng; the setting is voice, speed in words a minute, pitch 0 to 99."""
    voice, speed, pitch = setting
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    spoken = subprocess.run(command, capture_output=True, check=True)
    return to_bank_pcm(*sf.read(io.BytesIO(spoken.stdout), dtype="float32"))


def flite(text: str, setting: tuple[str, float, int]) -> np.ndarray | None:
    """Speak with flite; the setting is voice, stretch of the duration, mean pitch in Hz."""
    voice, stretch, pitch = setting
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "spoken.wav"
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}"]
        command += ["--setf", f"int_f0_target_mean={pitch}", "-t", text, "-o", str(wav)]
        subprocess.run(command, capture_output=True, check=True)
        return to_bank_pcm(*sf.read(wav, dtype="float32"))


def random_phrase(rng: random.Random) -> str:
    """Return up to six digits, or up to four of all words."""
    if rng.random() < 0.6:
        return " ".join(rng.choice(DIGITS) for _ in range(rng.randint(1, 6)))
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))


def _random_espeak(rng: random.Random) -> tuple[str, int, int]:
    voice = rng.choice(ESPEAK_ACCENTS) + rng.choice(ESPEAK_VARIANTS)
    return voice, rng.randint(110, 190), rng.randint(25, 75)


def _jobs(rng: random.Random, scale: float) -> list[_Job]:
    jobs = []
    for _ in range(round(120 * scale)):
        setting = _random_espeak(rng)
        jobs += [_Job("w", espeak, word, setting) for word in WORDS]
    for setting in FLITE_SETTINGS[:: max(1, round(1 / scale))]:
        jobs += [_Job("w", flite, word, setting) for word in WORDS]
    for _ in range(round(4000 * scale)):
        setting = _random_espeak(rng)
        jobs.append(_Job("p", espeak, random_phrase(rng), setting))
    for _ in range(round(3000 * scale)):
        jobs.append(_Job("p", flite, random_phrase(rng), rng.choice(FLITE_SETTINGS)))
    return jobs


def _run(job: _Job) -> Utterance | None:
    try:
        pcm = job.render(job.text, job.setting)
    except (subprocess.CalledProcessError, sf.LibsndfileError):
        return None  # a voice this installation lacks
    voice = f"{job.render.__name__}:{job.setting[0]}"
    return None if pcm is None else Utterance(job.kind, job.text, voice, pcm)


def render_bank(scale: float, threads: int) -> list[Utterance]:
    """Render words and phrases with espeak-ng and flite; `scale` 1 is the full bank."""
    jobs = _jobs(random.Random(0), scale)
    with ThreadPoolExecutor(threads) as pool:
        return [utterance for utterance in pool.map(_run, jobs) if utterance]


def _hibari_texts(rng: random.Random) -> Iterator[tuple[str, str, str, float]]:
    """Yield kind, what is said, what is typed, speed: every word ten times, then phrases without end."""
    for speed in (0.75, 0.85, 1.0, 1.15, 1.3):
        for word in WORDS:
            for _ in range(2):
                yield "w", word, word + rng.choice([".", "", "?", ","]), speed
    while True:
        phrase = random_phrase(rng)
        typed = phrase if rng.random() < 0.5 else phrase.replace(" ", ", ")
        yield "p", phrase, typed, rng.uniform(0.75, 1.3)


def render_neural(seconds: float) -> list[Utterance]:
    """Render with hibari, a small neural voice: as much as the time allows, at most 5,000 utterances."""
    import hibari

    speaker, rng = hibari.Hibari(), random.Random(1)
    utterances: list[Utterance] = []
    started = time.monotonic()
    for kind, text, typed, speed in _hibari_texts(rng):
        if time.monotonic() - started > seconds or len(utterances) >= 5000:
            return utterances
        spoken = np.asarray(speaker(typed, speed=speed, seed=rng.randint(0, 9999)), dtype=np.float32)
        pcm = to_bank_pcm(spoken, 24_000)
        if pcm is not None:
            utterances.append(Utterance(kind, text, "hibari", pcm))
    return utterances


def load_bank(folder: Path, hold_out: str = "slt") -> Bank:
    """Read what `main` wrote, without flite's voice `hold_out`, which is kept for the evaluation."""
    rows = [
        Utterance(*row)
        for name in ("bank.pkl", "bank_neural.pkl")
        if (folder / name).exists()
        for row in pickle.loads((folder / name).read_bytes())
    ]
    rows = [row for row in rows if not row.voice.endswith(f":{hold_out}")]
    words: dict[tuple[str, str], list[np.ndarray]] = {}
    for row in rows:
        if row.kind == "w":
            words.setdefault((row.voice, row.text), []).append(row.pcm)
    known = Counter(voice for voice, _ in words)
    full = [voice for voice, count in known.items() if count > 30]
    voices = full + [voice for voice in full if voice.startswith("flite")] * 6
    if "hibari" in full:
        voices += ["hibari"] * max(1, len(full) // 2)
    phrases = [row for row in rows if row.kind == "p"]
    return Bank(words, phrases + [row for row in phrases if row.voice == "hibari"], voices)


def add_humans(bank: Bank, folder: Path, unseen: tuple[str, ...] = ("theo", "yweweler")) -> None:
    """Add a folder of DIGIT_SPEAKER_TAKE.wav (Free Spoken Digit Dataset, CC BY-SA 4.0) to a bank.

    Two speakers, and takes 3 and 17 of the others, stay unseen for the evaluation.
    """
    for path in sorted(folder.glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        if speaker in unseen or take in ("3", "17"):
            continue
        pcm, rate = sf.read(path, dtype="float32")
        pcm = soxr.resample(pcm, rate, SAMPLE_RATE)
        pcm = (pcm / (np.abs(pcm).max() + 1e-9) * 0.7 * 32767).astype(np.int16)
        bank.words.setdefault((f"human:{speaker}", DIGITS[int(digit)]), []).append(pcm)
    bank.humans = sorted({voice for voice, _ in bank.words if voice.startswith("human:")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the bank")
    parser.add_argument("--neural", action="store_true", help="render with hibari (package hibari-tts)")
    parser.add_argument("--seconds", type=float, default=150, help="time for --neural (default: 150)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full bank, for a quick look")
    parser.add_argument("--threads", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    utterances = render_neural(args.seconds) if args.neural else render_bank(args.scale, args.threads)
    # Plain tuples: a class of a script run as __main__ could not be read back elsewhere.
    name = "bank_neural.pkl" if args.neural else "bank.pkl"
    (args.out / name).write_bytes(pickle.dumps([tuple(row) for row in utterances]))
    hours = sum(len(row.pcm) for row in utterances) / SAMPLE_RATE / 3600
    print(f"{len(utterances)} utterances, {hours:.2f} h")


if __name__ == "__main__":
    main()
