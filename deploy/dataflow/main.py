"""What Dataflow's Flex Template launcher runs: submits a job and leaves it.

A parameter of the template is a key of a job file (`over_length=split`, its value read as YAML, so that
`tasks=[caption, transcript]` is a list) or an option of Beam's (`machine_type=g2-standard-8`).
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from af3pipe.models.engine import ModelError
from af3pipe.pipelines.beam_flags import split_beam_flags
from af3pipe.pipelines.job import JobConfig, JobError, make_job
from af3pipe.pipelines.submit import submit
from af3pipe.schemas import Rejected
from af3pipe.storage import StorageError

# The image has Beam, and one process on a worker has the model: more would each load it into the same GPU.
DEFAULTS = ("--runner=DataflowRunner", "--sdk_location=container", "--experiments=no_use_multiple_sdk_containers")
_log = logging.getLogger("af3pipe")


def parse(flags: Sequence[str]) -> tuple[JobConfig, list[str]]:
    """The job, and what is Beam's, of `--name=value` flags; the launcher's own among them.

    Raises:
        JobError: One is neither, or the job is wrong.
    """
    values: dict[str, Any] = {}
    others = []
    for flag in flags:
        name, has_value, value = flag.removeprefix("--").partition("=")
        if flag.startswith("--") and has_value and name in JobConfig.model_fields:
            values[name] = _value(name, value)
        else:
            others.append(flag)
    stray, beam_flags = split_beam_flags(others)
    if stray:
        raise JobError(f"{' '.join(stray)} is no parameter; parameters are --name=value")
    given = [flag.partition("=")[0] for flag in beam_flags]
    defaults = [flag for flag in DEFAULTS if flag.startswith("--experiments") or flag.partition("=")[0] not in given]
    return make_job(values, "parameters"), [*defaults, *beam_flags]


def _value(name: str, text: str) -> Any:
    if JobConfig.model_fields[name].annotation in (str, str | None):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"{name} is {text!r}, which is not YAML: {error}") from error


def main() -> None:
    """Runs the launcher."""
    logging.basicConfig(level=logging.INFO)
    try:
        job, beam_flags = parse(sys.argv[1:])
        run_id = submit(job, beam_flags)
    except (JobError, ModelError, StorageError, Rejected) as error:
        sys.exit(f"error: {error}")
    _log.info("run %s is submitted; its rows land in %s", run_id, job.output)


if __name__ == "__main__":
    main()
