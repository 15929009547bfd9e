"""Reads job files (YAML) and merges them with the inputs and flags of a command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from af3pipe.pipelines.beam_flags import split_beam_flags
from af3pipe.pipelines.job import JobConfig, JobError, make_job


def load_job_values(path: str) -> dict[str, Any]:
    """Reads the keys of a YAML job file without validating them, so that flags can be merged in.

    Raises:
        JobError: There is no such file, it is not a YAML mapping, or a mapping in it has a key twice.
    """
    try:
        values = load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: is not UTF-8: {error}") from error
    except _DuplicateKey as error:
        raise JobError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise JobError(f"{path}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise JobError(f"{path}: must hold keys and values, for example `inputs: [archive/]`")
    return values


def merge_job(tokens: list[str], flags: Mapping[str, Any]) -> tuple[JobConfig, list[str]]:
    """Merges a command line: inputs or one job file, flags, and Beam's flags. Flags take precedence over the file.

    Args:
        tokens: Tokens that are not flags of af3pipe: inputs, a job file, and flags for Beam.
        flags: Values of af3pipe's flags, by key of the job.

    Returns:
        The job, and the flags for Beam.

    Raises:
        JobError: There are several job files, one cannot be read, or the job is invalid.
    """
    inputs, beam_flags = split_beam_flags(tokens)
    job_files = [name for name in inputs if name.endswith((".yaml", ".yml"))]
    if not job_files:
        return make_job({"inputs": inputs, **flags}), beam_flags
    if len(job_files) > 1:
        raise JobError(f"one job file at a time, not {', '.join(job_files)}")
    values = load_job_values(job_files[0])
    others = [name for name in inputs if name not in job_files]
    if "watch" in flags:
        in_file = values.get("watch") or {}
        flags = {**flags, "watch": in_file | flags["watch"] if isinstance(in_file, dict) else in_file}
    return make_job({**values, **flags, **({"inputs": others} if others else {})}, job_files[0]), beam_flags


def load_yaml(text: str) -> Any:
    """Reads YAML as `yaml.safe_load` does, but refuses a mapping with a key twice.

    Raises:
        YAMLError: The text is not YAML, or a key is given twice: names the key and both lines.
    """
    return yaml.load(text, _UniqueKeys)


class _DuplicateKey(yaml.YAMLError):
    pass


class _UniqueKeys(yaml.SafeLoader):
    """Rejects duplicate keys, of which YAML readers silently use the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _DuplicateKey(f"line {line}: the key {key.value!r} is given twice, first in line {lines[name]}")
            lines[name] = line
        return node
