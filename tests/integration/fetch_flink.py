"""Downloads the jars for tests/integration/flink.py: Flink and Beam's Flink job server.

    python -m tests.integration.fetch_flink

Flink's own come out of a source distribution on PyPI, made for PyFlink, which is unpacked and not installed. Beam's
job server is one artifact and what that depends on, which Maven collects. Needs pip, mvn and a network that reaches
their registries; about 370 MB, in `flink_home()`. What is there already is left as it is.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FLINK_VERSION = "1.19.1"
# The newest whose job server runs when Maven collects it; Beam's Python SDK may be newer.
BEAM_VERSION = "2.62.0"
_ARTIFACT = f"beam-runners-flink-{FLINK_VERSION.rpartition('.')[0]}"
_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
<modelVersion>4.0.0</modelVersion><groupId>af3pipe</groupId><artifactId>job-server</artifactId><version>1</version>
<dependencies><dependency>
<groupId>org.apache.beam</groupId><artifactId>{_ARTIFACT}</artifactId><version>{BEAM_VERSION}</version>
</dependency></dependencies>
</project>
"""


def flink_home() -> Path:
    """Where the jars are, outside the tree: `lib/` of Flink, `job_server/` of Beam."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("AF3PIPE_FLINK_HOME") or cache / "af3pipe" / f"flink-{FLINK_VERSION}")


def fetch() -> None:
    """Fetches what is not there yet.

    Raises:
        CalledProcessError: pip or Maven failed, and said why.
        FileNotFoundError: There is no mvn.
    """
    home = flink_home()
    for name, get in (("lib", _fetch_flink), ("job_server", _fetch_job_server)):
        began = time.monotonic()
        if not (home / name).exists():
            _whole_or_not_at_all(home / name, get)
            print(f"fetched {home / name} in {time.monotonic() - began:.0f} s", flush=True)


def _whole_or_not_at_all(folder: Path, get: Callable[[Path, Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        found = Path(scratch, "found")
        found.mkdir()
        get(Path(scratch), found)
        found.rename(folder)


def _fetch_flink(scratch: Path, found: Path) -> None:
    name = f"apache-flink-libraries=={FLINK_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", name]
    subprocess.run([*command, f"--dest={scratch}"], check=True)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        for member in files:
            if member.isfile() and Path(member.name).match("deps/lib/*.jar"):
                source = files.extractfile(member)
                assert source is not None
                with (found / Path(member.name).name).open("wb") as target:
                    shutil.copyfileobj(source, target)


def _fetch_job_server(scratch: Path, found: Path) -> None:
    pom = scratch / "pom.xml"
    pom.write_text(_POM)
    command = ["mvn", "--quiet", "--batch-mode", f"--file={pom}", "dependency:copy-dependencies"]
    subprocess.run([*command, f"-DoutputDirectory={found}", "-DincludeScope=runtime"], check=True)


if __name__ == "__main__":
    fetch()
