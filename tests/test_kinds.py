"""tests/README.md names every file of tests, and no other."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent


def test_every_file_is_of_some_kind():
    named = set(re.findall(r"`([\w/]*test_\w+\.py)`", (FOLDER / "README.md").read_text(encoding="utf-8")))
    there = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("test_*.py")}
    assert named == there
