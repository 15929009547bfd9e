"""Measures word accuracy of the demo checkpoint on a human voice outside its training data, with `af3pipe run`.

    python -m benchmarks.digits [--folder DIR] [--transcripts FILE]

Recordings and transcripts are Debian's asterisk-core-sounds-en-wav and asterisk-core-sounds-en: studio prompts for a
telephone exchange, 8 kHz, one speaker. Only words that the checkpoint was taught are counted.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from af3pipe import storage
from af3pipe.tables.reconcile import read_rows
from benchmarks import machine
from tools.demo_checkpoint.vocabulary import DIGITS, WORDS

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")


def transcripts(path: Path) -> dict[str, str]:
    """Name of a prompt, for example `digits/7`, to what is said in it."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    pairs = (line.partition(": ") for line in lines if not line.startswith(";"))
    return {name: words(said) for name, found, said in pairs if found}


def words(text: str) -> str:
    return " ".join(re.sub("[^a-z ]", "", text.lower()).split())


def heard(files: list[Path], output: Path) -> tuple[dict[str, str], str]:
    """What `af3pipe run` writes for the files, by path, and its last lines."""
    manifest = output / "files.jsonl"
    manifest.write_text("".join(json.dumps({"uri": str(path)}) + "\n" for path in files))
    command = [sys.executable, "-m", "af3pipe", "run", str(manifest), "--output", str(output / "out")]
    command += ["--model", "demo", "--task", "transcript", "--max-new-tokens", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = read_rows(storage.list_files(str(output / "out" / "transcripts")), ["uri", "text"])
    return {row["uri"]: words(row["text"]) for row in rows}, done.stdout


def errors(said: list[str], found: list[str]) -> int:
    """Word edits from what was said to what was heard."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(said):
        last, row[0] = row[0], i + 1
        for j, other in enumerate(found):
            last, row[j + 1] = row[j + 1], min(last + (word != other), row[j + 1] + 1, row[j] + 1)
    return row[-1]


def table(name: str, pairs: list[tuple[str, str]]) -> Iterator[str]:
    total = sum(len(said.split()) for said, _ in pairs)
    wrong = sum(errors(said.split(), found.split()) for said, found in pairs)
    exact = sum(said == found for said, found in pairs)
    yield f"{name:28}{len(pairs):8}{exact / len(pairs):10.0%}{wrong / total:10.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=SOUNDS)
    parser.add_argument("--transcripts", type=Path, default=TRANSCRIPTS)
    asked = parser.parse_args()
    said = {
        asked.folder / f"{name}.wav": text
        for name, text in transcripts(asked.transcripts).items()
        if text and set(text.split()) <= set(WORDS) and (asked.folder / f"{name}.wav").exists()
    }
    with tempfile.TemporaryDirectory() as name:
        found, summary = heard(list(said), Path(name))
    digits = {asked.folder / "digits" / f"{number}.wav": word for number, word in enumerate(DIGITS)}
    print(machine.describe())
    print(f"{'prompts':28}{'files':>8}{'exact':>10}{'WER':>10}")
    print(*table("digits 0-9", [(word, found[str(path)]) for path, word in digits.items()]), sep="\n")
    print(*table("all in its vocabulary", [(text, found[str(path)]) for path, text in said.items()]), sep="\n")
    for path, text in said.items():
        print(f"  {path.parent.name}/{path.stem}: {text!r} heard as {found[str(path)]!r}")
    print(summary.strip())


if __name__ == "__main__":
    main()
