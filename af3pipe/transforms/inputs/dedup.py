"""What is told of several times, by messages or by several inputs, once."""

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
"""Stores tell of an object twice within minutes, if they do. What is told of later is asked again."""


def _version(found: Recording | DeadLetter) -> str:
    """Of which bytes of what; rows of messages may give the same id to several recordings."""
    if isinstance(found, DeadLetter):
        return repr((found.reason.value, _version(recording_of(found.input))))
    cut = found.offset_s, found.duration_s, found.channel, found.stream
    return repr((found.content_identity, found.uri, *cut))


class _OnceDoFn(beam.DoFn):
    """Keyed by recording: lets a version pass unless it was the last to pass, not long ago.

    No timer clears the state: a stream that is stopped would wait for it.
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
            if isinstance(found, Recording):  # a dead letter is done when it is made
                metrics.count("recordings_repeated")
            return
        passed.write(f"{time.time()!r} {version}")
        yield from tagged([found])


class Once(beam.PTransform):
    """Lets each version of a recording, and each of its dead letters, pass once in `remember_s` seconds.

    Takes and gives an `Outcome` of `Recording`. What comes back as it was, after it was something else, passes again.

    Args:
        remember_s: How long what has passed is remembered.
    """

    def __init__(self, remember_s: float = REMEMBER_S) -> None:
        super().__init__()
        self._remember_s = remember_s

    def expand(self, found: Any) -> Any:
        once = (
            (found.good, found.dead_letters)
            | "RecordingsAndLetters" >> beam.Flatten()
            | "ById" >> beam.Map(lambda one: (one.recording_id, one)).with_output_types(tuple[str, Any])
            | "Once"
            >> beam.ParDo(_OnceDoFn(self._remember_s))
            .with_output_types(Recording, **{DEAD_LETTERS: DeadLetter})
            .with_outputs(DEAD_LETTERS, main="recordings")
        )
        return Outcome(once.recordings, once[DEAD_LETTERS])
