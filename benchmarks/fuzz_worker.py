"""Runs a batch for `benchmarks.fuzz` in a process that may crash, hang or leave child processes behind.

python -m benchmarks.fuzz_worker run FOLDER OUTPUT MODEL OVER_LENGTH    # the pipeline over a folder
python -m benchmarks.fuzz_worker look FOLDER MODEL [AFTER]              # file by file: which one is it?
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from benchmarks import constant_engine
from benchmarks.memory import peak_mib

RUN_LIMIT_S = 600.0  # some hundred files take seconds; a decoder that hangs has a limit of its own
FILE_LIMIT_S = 60.0  # more than any limit that the pipeline itself sets a decoder
_MARK = "AF3PIPE_FUZZ_RUN"
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Run(NamedTuple):
    """How a worker ended.

    Attributes:
        told: What it printed last, None where it did not come to that.
        died: How, in words; empty where it ended well.
        left: Command lines of processes that outlived it; they are ended.
        others_mib: Most memory that the processes it started held at once.
    """

    told: dict | None
    died: str
    left: list[str]
    others_mib: float


def work(*arguments: str, limit_s: float = RUN_LIMIT_S) -> Run:
    """Runs a worker to its end, or to its limit."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.fuzz_worker", *arguments]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, env=os.environ | {_MARK: mark})
        began, others_mib = time.monotonic(), 0.0
        while process.poll() is None and time.monotonic() - began < limit_s:
            others_mib = max(others_mib, sum(map(_resident_mib, set(_marked(mark)) - {process.pid})))
            time.sleep(0.1)
        hung = process.poll() is None
        if hung:
            process.kill()
        code = process.wait()
        left = _end_what_is_left(mark)
        said.seek(0)
        lines = said.read().splitlines()
        if code == 0:
            return Run(json.loads(lines[-1]), "", left, others_mib)
        errors.seek(0)
        why = f"hung for {limit_s:.0f} s" if hung else _in_words(code)
        text = errors.read()
        crash = text.find("Fatal Python error")  # where faulthandler begins; the list of all modules follows
        about = text[-2000:] if crash < 0 else text[crash : crash + 2000].partition("Extension modules")[0]
        return Run(None, f"{why}: {about.strip()}", left, others_mib)


def culprits(folder: Path, model: Path) -> dict[str, str]:
    """Names of the files that end or hang a process that decodes them, and how they do it."""
    found: dict[str, str] = {}
    after = ""
    while True:
        name, how = _look(folder, model, after)
        if not how:
            return found
        found[name] = how
        after = name


def _look(folder: Path, model: Path, after: str) -> tuple[str, str]:
    """The last file that was begun, and how it ended the process; nothing where all went well."""
    command = [sys.executable, "-m", "benchmarks.fuzz_worker", "look", str(folder), str(model), after]
    with tempfile.NamedTemporaryFile("r") as said, Path(said.name).open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        begun, since = "", time.monotonic() + FILE_LIMIT_S  # the first line comes after all imports
        while process.poll() is None:
            lines = Path(said.name).read_text().splitlines()
            if lines and lines[-1] != begun:
                begun, since = lines[-1], time.monotonic()
            if time.monotonic() - since > FILE_LIMIT_S:
                process.kill()
                process.wait()
                if not begun:
                    raise RuntimeError(f"the worker did not begin in {2 * FILE_LIMIT_S:.0f} s")
                return begun, f"hung for {FILE_LIMIT_S:.0f} s"
            time.sleep(0.05)
        lines = Path(said.name).read_text().splitlines()
        return (lines[-1] if lines else after), _in_words(process.returncode)


def _in_words(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with {code}" if code else ""


def _marked(mark: str) -> list[int]:
    """Processes of one run, however they were started and whoever is their parent now."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and f"{_MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return found


def _resident_mib(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 2**20
    except OSError:
        return 0.0


def _end_what_is_left(mark: str, grace_s: float = 3.0) -> list[str]:
    deadline = time.monotonic() + grace_s
    while (pids := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = []
    for pid in pids:
        try:
            names.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip())
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    return names


def run(folder: str, output: str, model: str, over_length: str) -> dict[str, object]:
    """In the worker: the pipeline as it is, but for the time its model takes."""
    from af3pipe.pipelines import batch
    from af3pipe.pipelines.job import make_job

    constant_engine.window_s = 0.0
    values = {
        "inputs": [f"{folder}/*"],  # a folder would be searched for audio extensions only
        "output": output,
        "model": model,
        "engine": constant_engine.register(),
        "tasks": ["caption"],
        "over_length": over_length,
    }
    report = batch.run(make_job(values), progress_every_s=0.05)
    return {
        "found": report.counts.found,
        "problems": list(report.counts.problems),
        "wall_s": report.wall_s,
        "audio_s": report.counts.audio_s,
        "peak_mib": peak_mib(),
    }


def look(folder: str, model: str, after: str = "") -> None:
    """In the worker: each file's name, and then its decoding in this very process."""
    from af3pipe.models import open_checkpoint
    from af3pipe.schemas import Recording
    from af3pipe.transforms.decode import open_segments

    limits = open_checkpoint(model).limits
    for path in sorted(Path(folder).iterdir()):
        if path.name > after:
            print(path.name, flush=True)
            try:
                for _ in open_segments(Recording(path.name, str(path)), limits=limits, over_length="split"):
                    pass
            except Exception:  # noqa: BLE001  (what is looked for leaves no exception)
                pass


if __name__ == "__main__":
    way, *rest = sys.argv[1:]
    if way == "look":
        look(*rest)
    else:
        print(json.dumps(run(*rest)))
