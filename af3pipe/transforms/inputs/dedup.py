"""Deduplicates recordings that arrive via several messages or inputs."""

import time
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.coders import StrUtf8Coder
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec

from af3pipe.schemas import DeadLetter, Recording
from af3pipe.transforms import metrics
from af3pipe.transforms.inputs.read import tagged
from af3pipe.transforms.outcome import DEAD_LETTERS, Outcome, recording_of

REMEMBER_S = 24 * 3600
"""Duplicate notifications of stores arrive within minutes; a notification after this time is processed again."""


def _version(found: Recording | DeadLetter) -> str:
    """Identifies content and part of an object; rows of messages may give the same id to several recordings."""
    if isinstance(found, DeadLetter):
        return repr((found.reason.value, _version(recording_of(found.input))))
    cut = found.offset_s, found.duration_s, found.channel, found.stream
    return repr((found.content_identity, found.uri, *cut))


class _DeduplicateDoFn(beam.DoFn):
    """Keyed by recording: drops a version if it was the last one to pass and that was recently.

    No timer clears the state, because a stopped stream would wait for the timer.
    """

    _PASSED = ReadModifyWriteStateSpec("passed", StrUtf8Coder())

    def __init__(self, remember_s: float) -> None:
        self._remember_s = remember_s

    def process(
        self, keyed: tuple[str, Recording | DeadLetter], passed: Any = beam.DoFn.StateParam(_PASSED)
    ) -> Iterator[Any]:
        found = keyed[1]
        version = _version(found)
        passed_at, _, passed_version = (passed.read() or "0 ").partition(" ")
        if passed_version == version and time.time() - float(passed_at) < self._remember_s:
            if isinstance(found, Recording):  # dead letters are not counted
                metrics.count("recordings_repeated")
            return
        passed.write(f"{time.time()!r} {version}")
        yield from tagged([found])


class Deduplicate(beam.PTransform):
    """Drops repetitions of a version of a recording, or of one of its dead letters, within `remember_s` seconds.

    Input and output are an `Outcome` of `Recording`. A version that returns after another version passes again.

    Args:
        remember_s: How long the last version of a recording is remembered.
    """

    def __init__(self, remember_s: float = REMEMBER_S) -> None:
        super().__init__()
        self._remember_s = remember_s

    def expand(self, found: Any) -> Any:
        distinct = (
            (found.good, found.dead_letters)
            | "RecordingsAndLetters" >> beam.Flatten()
            | "ById" >> beam.Map(lambda one: (one.recording_id, one)).with_output_types(tuple[str, Any])
            | "Deduplicate"
            >> beam.ParDo(_DeduplicateDoFn(self._remember_s))
            .with_output_types(Recording, **{DEAD_LETTERS: DeadLetter})
            .with_outputs(DEAD_LETTERS, main="recordings")
        )
        return Outcome(distinct.recordings, distinct[DEAD_LETTERS])
