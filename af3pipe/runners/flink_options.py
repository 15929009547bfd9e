"""Declares the options of Beam's Flink runner that Beam for Python leaves out."""

import argparse
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

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
"""Flink's switches that are on by default; they take true or false."""


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
