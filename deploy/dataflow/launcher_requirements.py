"""Prints what a launcher needs of pyproject.toml: every dependency but those that only a worker uses."""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

WORKERS_OWN = ("torch", "transformers")


def requirements(pyproject: str) -> list[str]:
    """Of the text of a pyproject.toml: the dependencies, and those of the extra `dataflow`."""
    project = tomllib.loads(pyproject)["project"]
    return [
        wanted
        for wanted in [*project["dependencies"], *project["optional-dependencies"]["dataflow"]]
        if re.split(r"[^\w.-]", wanted)[0] not in WORKERS_OWN
    ]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]).read_text(encoding="utf-8"))))
