"""Finds Beam's name of a runner from the name that a user wrote."""

import difflib
import importlib

from apache_beam.options.pipeline_options import StandardOptions

RUNNERS = ("local", "flink", "prism", "portable", "dataflow")
"""Short names of the runners that are tested."""
IN_PROCESS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "SwitchingDirectRunner")
"""Beam's names of the runners that run the pipeline in the process that starts it."""

_BEAMS: dict[str, str] = {name.lower(): name for name in StandardOptions.KNOWN_RUNNER_NAMES} | {
    "localrunner": "FnApiRunner"
}


def runner_name(name: str) -> str:
    """Returns Beam's name of a runner: `flink` and `FLINKRUNNER` give `FlinkRunner`, `local` Beam's in-process one.

    Args:
        name: In any case; or the module and class of a runner that is not Beam's own.

    Raises:
        ValueError: No such runner.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if found := _BEAMS.get(key) or _BEAMS.get(f"{key}runner"):
        return found
    module, _, class_name = name.rpartition(".")
    if not module:
        near = difflib.get_close_matches(key, [*RUNNERS, *_BEAMS], n=1)
        hint = f"did you mean {_BEAMS.get(near[0], near[0])}? " if near else ""
        raise ValueError(f"runner is {name!r}, which is not known; {hint}Choose from {', '.join(RUNNERS)}")
    try:
        getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"runner is {name!r}, which cannot be imported: {error}") from error
    return name


def short_name(name: str) -> str:
    """Returns the name that a user would write: `flink` for `FlinkRunner`, `local` for the in-process ones."""
    if name in IN_PROCESS:
        return "local"
    return name.rpartition(".")[2].removesuffix("Runner").lower()
