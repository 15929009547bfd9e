"""Reads Beam's options from a command line and from a job's `beam` keys."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from af3pipe.pipelines.job import JobConfig, JobError, WatchConfig
from af3pipe.runners.check import options_of_others, runner_of
from af3pipe.runners.flink_options import ON_BY_DEFAULT
from af3pipe.runners.names import runner_name, short_name
from af3pipe.runners.parser import beam_parser
from af3pipe.runners.runner import RunnerError

_log = logging.getLogger(__name__)


def beam_options(
    job: JobConfig, flags: Sequence[str] = (), *, default_runner: str = "FnApiRunner"
) -> PipelineOptions:
    """Merges the job's `beam` keys with flags for Beam; flags take precedence.

    If the flags name another runner than the job does, keys that only the job's runner reads are ignored.

    Args:
        job: Job with Beam's options below `beam`.
        flags: Flags from `split_beam_flags`.
        default_runner: Runner if neither names one. The default is Beam's in-process runner by its own name, since
            `DirectRunner` first looks for another one to download.

    Raises:
        JobError: The runner is unknown, an option belongs to another runner, or one makes the runner lose elements.
    """
    spelt = [_as_beam_spells(flag) for flag in flags]
    named_by_job = _runner_in([f"--runner={job.beam['runner']}"] if job.beam.get("runner") else [])
    named_by_flags = _runner_in(spelt)
    runner = named_by_flags or named_by_job or default_runner
    keys: dict[str, list[str]] = {}
    written = {}
    for key, value in job.beam.items():
        name = _beam_name(f"--{key}", f"beam.{key}").removeprefix("--")
        written[name], keys[name] = f"beam.{key}", _flags(name, value)
    foreign = options_of_others(runner, [name for name, given in keys.items() if given])
    if named_by_flags in (None, named_by_job):
        _refuse(runner, {written[name]: readers for name, readers in foreign.items()})
    elif foreign:
        ignored = ", ".join(written[name] for name in foreign)
        _log.warning("ignored, since the %s runner does not read it: %s of the job", short_name(runner), ignored)
    names = {flag.partition("=")[0][2:]: flag.partition("=")[0] for flag in spelt if flag.startswith("--")}
    _refuse(runner, {names[name]: readers for name, readers in options_of_others(runner, names).items()})
    listed = [flag for name, given in keys.items() if name not in foreign for flag in given]
    options = PipelineOptions([*listed, *spelt])
    options.view_as(StandardOptions).runner = runner
    try:
        runner_of(options).configure()
    except RunnerError as error:
        raise JobError(str(error)) from error
    return options


def _runner_in(flags: Sequence[str]) -> str | None:
    """Returns Beam's name of the runner that the flags choose; None if they choose none."""
    parsed, _ = _beam_parse(flags)
    try:
        return runner_name(parsed["runner"]) if parsed.get("runner") else None
    except ValueError as error:
        raise JobError(str(error)) from error


def _refuse(runner: str, foreign: Mapping[str, Sequence[str]]) -> None:
    """Raises JobError if there are options that only other runners read; names them as the user wrote them."""
    if foreign:
        raise JobError(
            "\n".join(
                f"{option} is an option of the {' and '.join(readers)} runner, which the {short_name(runner)} runner "
                f"ignores: leave it out, or add --runner {readers[0]}"
                for option, readers in foreign.items()
            )
        )


def _flags(key: str, value: Any) -> list[str]:
    if isinstance(value, bool) and key in ON_BY_DEFAULT:
        return [f"--{key}={str(value).lower()}"]
    if value is True:
        return [f"--{key}"]
    if value is False or value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}={item}" for item in value]
    return [f"--{key}={value}"]


def split_beam_flags(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the remaining tokens of a command line into inputs and Beam flags in Beam's spelling.

    Raises:
        JobError: Neither af3pipe nor Beam knows a flag, so that a misspelt flag is not taken for an input.
    """
    for token in tokens:
        if token.startswith("-") and token != "-":
            _beam_name(token.split("=")[0], token)
    spelt = [_as_beam_spells(token) for token in tokens]
    _, inputs = _beam_parse(spelt)
    remaining = list(inputs)
    flags = []
    for token in spelt:
        if remaining and token == remaining[0]:
            remaining.pop(0)
        else:
            flags.append(token)
    return inputs, flags


def _beam_parse(flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of Beam's options, and the other tokens. Raises JobError if a value is wrong."""
    try:
        parsed, others = beam_parser().parse_known_args(flags)
    except ValueError as error:
        raise JobError(str(error)) from error
    return vars(parsed), others


def _beam_names() -> set[str]:
    return {known for action in beam_parser()._actions for known in action.option_strings}


def _as_beam_spells(token: str) -> str:
    """Replaces `-` by `_` in an option if Beam knows it in that spelling, as `--flink-master=...`."""
    name, found, value = token.partition("=")
    spelt = f"--{name[2:].replace('-', '_')}"
    is_known = name.startswith("--") and name not in (names := _beam_names()) and spelt in names
    return f"{spelt}{found}{value}" if is_known else token


def _beam_name(name: str, as_written: str) -> str:
    """Returns Beam's spelling of an option. Raises JobError if Beam has no such option."""
    spelt, names = _as_beam_spells(name), _beam_names()
    if spelt not in names:
        own = {f"--{key.replace('_', '-')}" for key in JobConfig.model_fields} | {
            "--task",
            "--question",
            "--prompt",
            "--allow-prefix",
            *(f"--{key.replace('_', '-')}" for key in WatchConfig.model_fields),
        }
        near = difflib.get_close_matches(name, sorted(names | own), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise JobError(f"{as_written} is neither an option of af3pipe nor of Beam{hint}")
    return spelt
