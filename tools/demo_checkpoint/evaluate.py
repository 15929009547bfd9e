"""Measure a checkpoint with plain Hugging Face `generate`, greedy, on what it never heard.

python evaluate.py CHECKPOINT --digits DIR --spliced DIR --flite slt --samples samples/expected.json
"""

import argparse
import json
import random
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
import soxr
import torch
from transformers import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from vocabulary import DIGITS, TRANSCRIBE

SAMPLE_RATE = 16_000
STRINGS = 40
ROOT = Path(__file__).resolve().parents[2]


class Item(NamedTuple):
    """A recording (float32, 16 kHz mono), what is said in it, and the group it counts for."""

    pcm: np.ndarray
    words: str
    group: str = ""


def load(path: Path) -> np.ndarray:
    """Read a file as 16 kHz mono float32."""
    pcm, rate = sf.read(path, dtype="float32", always_2d=True)
    pcm = pcm.mean(1)
    return soxr.resample(pcm, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else pcm


class Listener:
    """A checkpoint that answers questions about recordings."""

    def __init__(self, checkpoint: Path) -> None:
        self._processor = AutoProcessor.from_pretrained(checkpoint)
        model = AudioFlamingo3ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        self._model = model.eval()

    def answer(self, recordings: list[np.ndarray], question: str, *, strip: bool = False) -> list[str]:
        """Ask one question of several recordings; `strip` takes the framing off a transcript."""
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": question}, {"type": "audio", "audio": pcm}],
                }
            ]
            for pcm in recordings
        ]
        inputs = self._processor.apply_chat_template(
            chats, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        tokens = self._model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return self._processor.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True, strip_prefix=strip
        )


def word_errors(wanted: list[str], heard: list[str]) -> int:
    """Return the edit distance of two lists of words."""
    row = list(range(len(heard) + 1))
    for deleted, word in enumerate(wanted, start=1):
        above, row = row, [deleted]
        for column, other in enumerate(heard):
            row.append(min(above[column] + (word != other), above[column + 1] + 1, row[column] + 1))
    return row[-1]


def measure(listener: Listener, name: str, items: list[Item], batch: int = 16) -> None:
    """Transcribe items and print the share that is exact, the word error rate, and some mistakes."""
    exact, total = Counter[str](), Counter(item.group for item in items)
    errors, mistakes = 0, []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        answers = listener.answer([item.pcm for item in part], TRANSCRIBE, strip=True)
        for item, answer in zip(part, answers, strict=True):
            wanted, heard = item.words.split(), re.sub("[^a-z ]", "", answer.lower()).split()
            errors += word_errors(wanted, heard)
            exact[item.group] += wanted == heard
            if wanted != heard:
                mistakes.append((item.words, answer))
    words = sum(len(item.words.split()) for item in items)
    print(f"{name}: {len(items)} recordings, exact {exact.total() / len(items):.3f}, WER {errors / words:.3f}")
    if len(total) > 1:
        print("  exact by group:", {group: round(exact[group] / total[group], 2) for group in total})
    print("  mistakes:", mistakes[:5], flush=True)


def single_digits(folder: Path) -> list[Item]:
    """Read files named WORD_SPEAKER..., such as seven_theo3.wav; they are grouped by speaker."""
    named = ((path, re.match(r"([a-z]+)_([a-z]+)", path.name)) for path in sorted(folder.iterdir()))
    return [Item(load(path), name[1], name[2]) for path, name in named if name]


def random_digits(rng: random.Random, fewest: int) -> list[str]:
    return [rng.choice(DIGITS) for _ in range(rng.randint(fewest, 5))]


def spliced_digits(folder: Path, rng: random.Random) -> list[Item]:
    """String single digits, 0.wav to 9.wav of one speaker, together with 0.2 s between them."""
    takes = {word: load(folder / f"{number}.wav") for number, word in enumerate(DIGITS)}
    gap, items = np.zeros(SAMPLE_RATE // 5, np.float32), []
    for _ in range(STRINGS):
        words = random_digits(rng, 2)
        items.append(Item(np.concatenate([part for word in words for part in (takes[word], gap)]), " ".join(words)))
    return items


def flite_digits(voice: str, rng: random.Random) -> list[Item]:
    """Let a flite voice say strings of digits."""
    items = []
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "spoken.wav"
        for _ in range(STRINGS):
            words = " ".join(random_digits(rng, 1))
            subprocess.run(["flite", "-voice", voice, "-t", words, "-o", str(wav)], check=True)
            items.append(Item(load(wav), words))
    return items


def check_samples(listener: Listener, expected: Path) -> None:
    """Ask the questions of expected.json, and print every answer that is not what was rendered."""
    asked = right = 0
    for sample in json.loads(expected.read_text(encoding="utf-8")):
        pcm = load(ROOT / sample["path"])
        for question, wanted in sample["expect"].items():
            answer = listener.answer([pcm], question)[0]
            asked, right = asked + 1, right + (answer == wanted)
            if answer != wanted:
                print(f"  {sample['path']}: {question} -> {answer!r}, not {wanted!r}")
    print(f"samples: {right} of {asked} answers as rendered", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--digits", type=Path, help="folder of WORD_SPEAKER... recordings, one digit each")
    parser.add_argument(
        "--spliced",
        type=Path,
        help="folder with 0.wav to 9.wav of one speaker, such as the digits of an Asterisk sound set",
    )
    parser.add_argument("--flite", metavar="VOICE", help="flite voice to speak strings of digits")
    parser.add_argument("--samples", type=Path, help="an expected.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    listener, rng = Listener(args.checkpoint), random.Random(0)
    if args.digits:
        measure(listener, "single digits", single_digits(args.digits))
    if args.spliced:
        measure(listener, "spliced digits", spliced_digits(args.spliced, rng))
    if args.flite:
        measure(listener, f"flite {args.flite}", flite_digits(args.flite, rng))
    if args.samples:
        check_samples(listener, args.samples)


if __name__ == "__main__":
    main()
