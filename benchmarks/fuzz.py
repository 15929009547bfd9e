"""Checks that every corrupt file ends in one terminal state and crashes no worker.

    python -m benchmarks.fuzz [--files 10000] [--seed 0] [--keep DIR]
    python -m benchmarks.fuzz --only N [--seed 0]       # writes file N to this folder, to look at

It corrupts files of real encoders in every format, by every mutation of `tests/mutations.py`, and runs the real batch
pipeline over them, with a constant engine instead of the model, a worker process for each 500 files, and all
over-length policies in turn.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from af3pipe import storage
from af3pipe.tables.reconcile import read_rows
from benchmarks import fuzz_worker, machine
from tests import mutations
from tests.mutations import Case
from tests.originals import FORMATS, missing_encoders

POLICIES = ("dead-letter", "truncate", "split")
CAP_S = 30.0
_WHOLE = frozenset({"unchanged", "renamed"})


class Fate(NamedTuple):
    """What became of one file.

    Attributes:
        state: Its terminal state; `worker died` for a file that ended its process.
        reason: Of its dead letter.
        surprise: The detail of a dead letter that nobody foresaw: it has a traceback.
        covered_s: Seconds of audio with an answer.
    """

    case: Case
    state: str
    reason: str = ""
    surprise: str = ""
    covered_s: float = 0.0


class Result(NamedTuple):
    """A whole run.

    Attributes:
        broken: Where the promise was not kept, in sentences.
        others_mib: Most memory of the processes that a worker started.
    """

    fates: list[Fate]
    broken: list[str]
    wall_s: float
    peak_mib: float
    others_mib: float

    @property
    def surprises(self) -> list[Fate]:
        """Files that raised what nobody foresaw."""
        return [fate for fate in self.fates if fate.surprise]


def fuzz(files: int, seed: int = 0, *, chunk: int = 500, keep: Path | None = None) -> Result:
    """Makes the files, runs the pipeline over them, and looks at what it wrote."""
    fates: list[Fate] = []
    broken: list[str] = []
    runs: list[fuzz_worker.Run] = []
    wall_s = 0.0
    with tempfile.TemporaryDirectory() as name:
        model = small_model(Path(name) / "model")
        for index, start in enumerate(range(0, files, chunk)):
            cases = [mutations.case(number, seed) for number in range(start, min(start + chunk, files))]
            began = time.perf_counter()
            chunk_fates = _run_chunk(
                cases, Path(name) / "chunk", model, POLICIES[index % len(POLICIES)], broken, runs
            )
            wall_s += time.perf_counter() - began
            fates += chunk_fates
            _keep_suspicious(chunk_fates, keep)
            print(f"{len(fates):7} of {files} files, {wall_s:6.1f} s", file=sys.stderr)
    peaks = [run.told["peak_mib"] for run in runs if run.told]
    return Result(fates, broken, wall_s, max(peaks, default=0.0), max(run.others_mib for run in runs))


def small_model(folder: Path) -> Path:
    """The demo checkpoint's configuration with a cap of one window, so that short files can be too long."""
    with resources.as_file(resources.files("af3pipe.demo") / "checkpoint") as checkpoint:
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_audio_len": int(CAP_S)}))
    return folder


def _run_chunk(
    cases: list[Case], folder: Path, model: Path, policy: str, broken: list[str], runs: list[fuzz_worker.Run]
) -> list[Fate]:
    """Runs the pipeline over some files; where a file ends its worker, again without that file."""
    inputs, output = folder / "in", folder / "out"
    inputs.mkdir(parents=True)
    for case in cases:
        (inputs / case.name).write_bytes(case.content)
    dead: dict[str, str] = {}
    try:
        while True:
            run = fuzz_worker.work("run", str(inputs), str(output), str(model), policy)
            runs.append(run)
            broken += [f"left behind by files {cases[0].number}-{cases[-1].number}: {line}" for line in run.left]
            if run.told is not None:
                break
            broken.append(f"files {cases[0].number}-{cases[-1].number}: the worker {run.died}")
            found = fuzz_worker.culprits(inputs, model)
            if not found:
                return [*_died(cases, dead), *(Fate(case, "no state") for case in cases if case.name not in dead)]
            dead |= found
            for name in found:
                (inputs / name).unlink()
            shutil.rmtree(output, ignore_errors=True)
        alive = [case for case in cases if case.name not in dead]
        broken += run.told["problems"]
        fates = list(fates_of(alive, _rows(output, "recordings"), _rows(output, "dead_letters"), broken))
        broken += [line for fate in fates for line in wrong_about(fate, policy)]
        return [*fates, *_died(cases, dead)]
    finally:
        shutil.rmtree(folder)


def _died(cases: list[Case], dead: dict[str, str]) -> list[Fate]:
    return [Fate(case, "worker died", dead[case.name]) for case in cases if case.name in dead]


def _rows(output: Path, table: str) -> list[dict]:
    return list(read_rows(storage.list_files(str(output / table))))


def fates_of(cases: Iterable[Case], recordings: list[dict], letters: list[dict], broken: list[str]) -> Iterator[Fate]:
    """Holds the tables against the list of files; what does not fit goes to `broken`."""
    states, reasons = defaultdict(list), defaultdict(list)
    for row in recordings:
        states[Path(row["uri"]).name].append(row)
    for row in letters:
        reasons[Path(row["uri"]).name].append(row)
    for case in cases:
        rows, own = states.pop(case.name, []), reasons.pop(case.name, [])
        if len(rows) != 1:
            broken.append(f"{_title(case)} has {len(rows)} terminal states")
            yield Fate(case, "no state")
            continue
        state = rows[0]["terminal_state"]
        if (state == "dead_letter" and not own) or (state == "ok" and own):
            broken.append(f"{_title(case)} is {state} with {len(own)} dead letters")
        surprise = next((row["detail"] for row in own if row["traceback"]), "")
        yield Fate(case, state, own[0]["reason"] if own else "", surprise, rows[0]["covered_s"])
    broken += [f"rows of no file: {name}" for name in (*states, *reasons)]


def wrong_about(fate: Fate, policy: str) -> Iterator[str]:
    """What cannot be true of a file's fate, whatever was done to it, or of a whole file's."""
    seconds = fate.case.original_s
    if fate.state in ("ok", "ok_partial") and not fate.covered_s > 0:
        yield f"{_title(fate.case)} is {fate.state} without any audio"
    # What has no header is known by its name alone.
    is_whole = fate.case.kind == "unchanged" or (fate.case.kind in _WHOLE and not FORMATS[fate.case.format].raw)
    if not is_whole or fate.state == "no state":
        return
    if seconds > CAP_S and policy == "dead-letter":
        right = fate.reason == "too_long"
    elif seconds > CAP_S and policy == "truncate":
        right = fate.state == "ok_partial" and abs(fate.covered_s - CAP_S) < 0.1
    else:  # what has no length in its header also has its encoder's padding
        right = fate.state == "ok" and -0.1 < fate.covered_s - seconds < 0.35
    if not right:
        is_now = f"{fate.state} {fate.reason}".strip()
        yield f"{_title(fate.case)} holds {seconds} s; under {policy} it is {is_now} with {fate.covered_s:.2f} s"


def _title(case: Case) -> str:
    return f"file {case.number} ({case.format}, {case.kind}, {case.name})"


def _keep_suspicious(fates: list[Fate], folder: Path | None) -> None:
    for fate in fates:
        if folder and (fate.surprise or fate.state in ("no state", "worker died")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / fate.case.name).write_bytes(fate.case.content)


def show(result: Result, by: str) -> None:
    """One table: files by terminal state, and dead letters by reason."""
    groups: dict[str, list[Fate]] = defaultdict(list)
    for fate in result.fates:
        groups[getattr(fate.case, by)].append(fate)
    groups["all"] = result.fates
    died = ["worker died"] if any(fate.state == "worker died" for fate in result.fates) else []
    reasons = sorted({fate.reason for fate in result.fates if fate.state not in ("ok", "ok_partial", *died)} - {""})
    columns = ["files", "ok", "shorter", "ok_partial", "dead_letter", *died, *reasons]
    print(f"\n{by:16}" + "".join(f"{column:>{max(len(column) + 2, 7)}}" for column in columns))
    for name, fates in groups.items():
        counts = Counter(fate.state for fate in fates)
        counts.update(fate.reason for fate in fates if fate.state == "dead_letter")
        counts["files"] = len(fates)
        counts["shorter"] = sum(fate.state == "ok" and fate.covered_s < 0.9 * fate.case.original_s for fate in fates)
        cells = "".join(f"{counts[column] or '':>{max(len(column) + 2, 7)}}" for column in columns)
        print(f"{name:16}{cells}")


def report(result: Result, seed: int) -> None:
    count = len(result.fates)
    print(machine.describe())
    print(f"{count} files, seed {seed}; {result.wall_s:.0f} s, {count / result.wall_s:.0f} files/s with its checks;")
    print(f"peak memory {result.peak_mib:.0f} MiB a worker, {result.others_mib:.0f} MiB in processes that it started")
    print("shorter: ok with less than 90% of what the whole file holds, which may be right")
    for by in ("format", "kind"):
        show(result, by)
    for fate in result.fates:
        if fate.state == "worker died":
            print(f"\nended its worker: {_title(fate.case)}: {fate.reason}")
    by_surprise: dict[str, list[Fate]] = defaultdict(list)
    for fate in result.surprises:
        by_surprise[fate.surprise].append(fate)
    for surprise, fates in by_surprise.items():
        print(
            f"\nnot foreseen, {len(fates)} times: {surprise}",
            *(f"    {_title(fate.case)}" for fate in fates),
            sep="\n",
        )
    print("\nThe promise holds." if not result.broken else "\nTHE PROMISE DOES NOT HOLD:")
    print(*result.broken, sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=500, help="files for each worker process")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave a copy of every suspicious file there")
    parser.add_argument("--only", type=int, metavar="N", help="write file N to the current folder, and nothing else")
    asked = parser.parse_args()
    if missing := missing_encoders():
        parser.error(
            f"an ffmpeg program is needed that encodes {', '.join(missing)} (Debian: ffmpeg libavcodec-extra)"
        )
    if asked.only is not None:
        case = mutations.case(asked.only, asked.seed)
        Path(case.name).write_bytes(case.content)
        print(_title(case))
        return 0
    result = fuzz(asked.files, asked.seed, chunk=asked.chunk, keep=asked.keep)
    report(result, asked.seed)
    return 1 if result.broken or result.surprises else 0


if __name__ == "__main__":
    sys.exit(main())
