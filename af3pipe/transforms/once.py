"""What is told of several times, by messages or by several inputs, once."""

import time
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.coders import StrUtf8Coder
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec

from af3pipe.schemas import DeadLetter, Recording
from af3pipe.transforms import metrics
from af3pipe.transforms.notify import version_of

REMEMBER_S = 24 * 3600
"""Stores tell of an object twice within minutes, if they do. What is told of later is asked again."""


class _OnceDoFn(beam.DoFn):
    """Keyed by recording: lets a version pass unless it was the last to pass, not long ago.

    No timer clears the state: a stream that is stopped would wait for it.
    """

    _PASSED = ReadModifyWriteStateSpec("passed", StrUtf8Coder())

    def __init__(self, remember_s: float) -> None:
        self._remember_s = remember_s

    def process(
        self, keyed: tuple[str, Recording | DeadLetter], passed: Any = beam.DoFn.StateParam(_PASSED)
    ) -> Iterator[Recording | DeadLetter]:
        found = keyed[1]
        _, version = version_of(found)
        passed_at, _, passed_version = (passed.read() or "0 ").partition(" ")
        if passed_version == version and time.time() - float(passed_at) < self._remember_s:
            metrics.count("recordings_told_again")
            return
        passed.write(f"{time.time()!r} {version}")
        yield found


class Once(beam.PTransform):
    """Lets each version of a recording, or each dead letter, pass once in `remember_s` seconds.

    Args:
        row_class: `Recording` or `DeadLetter`, which the PCollection has.
        remember_s: How long what has passed is remembered.
    """

    def __init__(self, row_class: type[Recording] | type[DeadLetter], remember_s: float = REMEMBER_S) -> None:
        super().__init__()
        self._row_class: Any = row_class
        self._remember_s = remember_s

    def expand(self, rows: Any) -> Any:
        row_class: Any = self._row_class
        keyed = rows | "ById" >> beam.Map(lambda found: (found.recording_id, found)).with_output_types(
            tuple[str, row_class]
        )
        return keyed | "Once" >> beam.ParDo(_OnceDoFn(self._remember_s)).with_output_types(row_class)
