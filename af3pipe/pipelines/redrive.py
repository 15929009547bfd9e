"""Processes the dead letters of an output again and writes the results to the same output."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from af3pipe import storage
from af3pipe.pipelines import batch
from af3pipe.pipelines.graph import found_by
from af3pipe.pipelines.job import JobConfig, JobError, make_job
from af3pipe.pipelines.report import RunReport
from af3pipe.schemas import DeadLetter, Recording, RecordingResult, Rejected, Stage
from af3pipe.tables.latest import latest
from af3pipe.tables.run_record import read_job
from af3pipe.transforms.outcome import recording_of
from af3pipe.transforms.result import gone_result

_ROW = re.compile(r"#(?:line|row|sample)=[^#]*$")  # of a manifest or a container
_log = logging.getLogger(__name__)
_COLUMNS = ["recording_id", "uri", "stage", "reason", "retryable", "input", "run_id"]


class Chosen(NamedTuple):
    """Selects dead letters that match all of these criteria; an empty collection or None matches everything."""

    reasons: Collection[str] = ()
    stages: Collection[str] = ()
    retryable: bool | None = None

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Returns whether a row of `dead_letters/` is selected."""
        return (
            (not self.reasons or row["reason"] in self.reasons)
            and (not self.stages or row["stage"] in self.stages)
            and (self.retryable is None or row["retryable"] == self.retryable)
        )


ALL = Chosen()


def redrive(
    output: str,
    chosen: Chosen = ALL,
    changes: Mapping[str, Any] | None = None,
    beam_flags: Iterable[str] = (),
    *,
    on_progress: Callable[[batch.Progress], None] = lambda progress: None,
) -> Iterator[tuple[JobConfig, RunReport]]:
    """Processes the current dead letters of an output again, in one run for each job that they come from.

    Each recording is read again, so that a file that was repaired is found; only requests without an answer are
    processed. A retry that fails for the same reason does not add a new dead-letter row.

    Args:
        output: Folder with the tables of earlier runs.
        chosen: Which dead letters.
        changes: Keys of the job that replace those of the earlier run, for example `{"over_length": "split"}`.
        beam_flags: Options for Beam, as on its command line.
        on_progress: See `batch.run`.

    Raises:
        JobError: The job of a run is no longer recorded, or a change is invalid.
        Rejected: The output cannot be read.
        ModelError, RunFailed, StorageError: See `batch.run`.
    """
    by_job: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    jobs: dict[str, dict[str, Any]] = {}
    rows = (row for table in latest(output).batches("dead_letters", _COLUMNS) for row in table.to_pylist())
    for row in filter(chosen.matches, rows):
        run_id = row["run_id"]
        if run_id not in jobs:
            jobs[run_id] = _job_of(output, run_id, changes or {})
        # Runs that differ in their inputs only are processed as one job.
        asked = {key: value for key, value in jobs[run_id].items() if key != "inputs"}
        by_job[json.dumps(asked, sort_keys=True)].append(row)
    for asked_json, letters in by_job.items():
        inputs = dict.fromkeys(name for row in letters for name in jobs[row["run_id"]]["inputs"])
        job = make_job(json.loads(asked_json) | {"inputs": list(inputs)}, f"the job of run {letters[0]['run_id']}")
        yield job, batch.run(job, beam_flags, again=list(_again(output, job, letters)), on_progress=on_progress)


def _job_of(output: str, run_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    try:
        values = read_job(output, run_id)
    except Rejected as rejected:
        raise JobError(
            f"the job of run {run_id} cannot be read ({rejected.detail}); run the job itself again, which processes "
            "requests without an answer and retryable failures"
        ) from rejected
    masked = [key for key, value in values.items() if key not in (*changes, "inputs") and "***" in json.dumps(value)]
    if masked:
        raise JobError(
            f"{', '.join(masked)} of run {run_id} had secrets, which are not recorded; give them by --job FILE, a "
            "job file with these keys"
        )
    return {**values, "output": output, **changes}


def _is_of_a_message(row: Mapping[str, Any]) -> bool:
    """Returns whether the row is of a message that could not be parsed, which has to be published again."""
    return "message" in json.loads(row["input"])


def _again(
    output: str, job: JobConfig, letters: list[Mapping[str, Any]]
) -> Iterator[Recording | DeadLetter | RecordingResult]:
    """Yields the recordings of dead letters, to be read again; lists again what could not be listed."""
    letters = [row for row in letters if not _is_of_a_message(row)]
    unlisted = [row for row in letters if row["stage"] == Stage.LIST.value]
    clashes = [row for row in unlisted if _is_clash(row, job.inputs)]
    if clashes:
        _log.warning(
            "%d dead letters are about manifest rows that contradict others, for example %s: correct the manifest "
            "and run the job again",
            len(clashes),
            clashes[0]["uri"],
        )
    unlisted = [row for row in unlisted if row not in clashes]
    for row in letters:
        if row["stage"] != Stage.LIST.value:
            yield recording_of(row["input"])._replace(size_bytes=None, etag=None, mtime=None)
    if not unlisted:
        return
    known = set(latest(output).read("recordings", ["recording_id"])["recording_id"].to_pylist())
    wanted = {row["recording_id"]: row for row in unlisted}
    for source in dict.fromkeys(_ROW.sub("", row["uri"]) for row in unlisted):
        for item in found_by(job, source):
            if wanted.pop(item.recording_id, None) or item.recording_id not in known:
                yield item
    for row in wanted.values():
        yield gone_result(recording_of(row["input"]))


def _is_clash(row: Mapping[str, Any], inputs: Sequence[str]) -> bool:
    """Returns whether a dead letter names the audio and not the manifest: two of its rows contradict each other."""
    if _ROW.search(row["uri"]) or row["uri"] in inputs:
        return False
    return "#" in row["uri"] or storage.name(row["uri"]).rpartition(".")[2].lower() in storage.AUDIO_EXTENSIONS
