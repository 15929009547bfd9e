"""Builds the library that delays Arrow's threads, from late_arrow.c."""

import shutil
import subprocess
import sysconfig
from pathlib import Path


def missing():
    """Why threads cannot be made late here; empty where they can."""
    if not shutil.which("gcc"):
        return "gcc is not on the path"
    # Else the interpreter's own symbols are found before those of a library that is preloaded.
    return "" if sysconfig.get_config_var("Py_ENABLE_SHARED") else "this Python is not a shared library"


def build(folder):
    """The path of the library, for LD_PRELOAD."""
    library, source = folder / "late_arrow.so", Path(__file__).with_suffix(".c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library
