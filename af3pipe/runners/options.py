"""Runners by their short names, and the options of theirs that Beam for Python does not know."""

import argparse
import difflib
import importlib
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

IN_PROCESS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "SwitchingDirectRunner")
RUNNERS = ("local", "flink", "prism", "portable", "dataflow")
"""Those that jobs are known to run on."""

_BEAMS: dict[str, str] = {name.lower(): name for name in StandardOptions.KNOWN_RUNNER_NAMES} | {
    "localrunner": "FnApiRunner"
}


def runner_name(name: str) -> str:
    """Beam's name for a runner: `flink` and `FLINKRUNNER` are `FlinkRunner`, `local` is Beam's in-process one.

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


_NUMBERS = (
    "auto_watermark_interval",
    "checkpoint_timeout_millis",
    "checkpointing_interval",
    "execution_retry_delay",
    "file_input_split_max_size_m_b",
    "job_check_interval_in_secs",
    "latency_tracking_interval",
    "max_bundle_size",
    "max_bundle_time_mills",
    "min_pause_between_checkpoints",
    "num_concurrent_checkpoints",
    "number_of_execution_retries",
    "shutdown_sources_after_idle_ms",
)
_TEXTS = (
    "checkpointing_mode",
    "execution_mode_for_batch",
    "flink_conf_dir",
    "report_checkpoint_duration",
    "savepoint_path",
    "state_backend",
    "state_backend_factory",
    "state_backend_storage_path",
)
_SWITCHES = (
    "allow_non_restored_state",
    "auto_balance_write_files_sharding_enabled",
    "disable_metrics",
    "enable_stable_input_drain",
    "externalized_checkpoints_enabled",
    "faster_copy",
    "finish_bundle_before_checkpointing",
    "force_unaligned_checkpoint_enabled",
    "load_balance_bundles",
    "object_reuse",
    "re_iterable_group_by_key_result",
    "retain_externalized_checkpoints_on_cancellation",
    "unaligned_checkpoint_enabled",
    "use_data_stream_for_batch",
)
ON_BY_DEFAULT = ("attached_mode", "fail_on_checkpointing_errors", "operator_chaining")
"""Switches of Flink's that are on: they take true or false."""


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


class FlinkOptions(PipelineOptions):
    """The options of Beam's Flink runner (FlinkPipelineOptions, in Java) that its Python half leaves out.

    Beam learns them from the job server when it submits; until then it warns of each as unparseable, a misspelt one
    looks no different, and one that is on by default cannot be given a value at all. They have no defaults here: what
    is not set is not sent.
    """

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        def add(name: str, **settings: Any) -> None:
            spellings = [f"--{name}"]
            if name == "max_bundle_time_mills":  # the option's own spelling; nobody expects it
                spellings.append("--max_bundle_time_millis")
            # A program of the user's own may have declared it already, having needed it before.
            if not parser._option_string_actions.keys() & set(spellings):
                parser.add_argument(*spellings, dest=name, **settings)

        for name in _NUMBERS:
            add(name, type=int)
        for name in _TEXTS:
            add(name)
        for name in _SWITCHES:
            add(name, action="store_true", default=None)
        for name in ON_BY_DEFAULT:
            add(name, type=_true_or_false)
