"""Defines the unit of work, an audio object with its requested recordings, and the result of a recording."""

from typing import NamedTuple

from af3pipe.schemas.answer import Answer
from af3pipe.schemas.dead_letter import DeadLetter
from af3pipe.schemas.recording import Recording, RecordingRow


class RecordingResult(NamedTuple):
    """All output rows of a recording in a run: its row, its new answers and its new dead letters.

    Attributes:
        row: The row of `recordings/`.
        answers: Rows of `captions/`, `transcripts/` and `answers/` that no earlier run has written.
        dead_letters: Rows of `dead_letters/` that no earlier run has written.
    """

    row: RecordingRow
    answers: tuple[Answer, ...] = ()
    dead_letters: tuple[DeadLetter, ...] = ()


class AudioObject(NamedTuple):
    """An audio object with all recordings requested of it: it is opened and decoded once for all of them.

    Attributes:
        uri: URI of the object; or of the rejected input, if there is no recording.
        recordings: Parts of this one object, or all of it; empty if all were rejected.
        dead_letters: Of recordings that were rejected before they were opened, and of other manifest rows with the
            same `recording_id` as one of `recordings`.
        copies: Answers that an earlier run has written for the same audio under another `recording_id` or with other
            metadata, as rows of one of `recordings`. One that answers a request of this run is written instead of
            running the model again.
        ready: Results of further recordings that need no audio: an earlier run has the same results, but they are not
            the latest ones, since a later run did something else.
    """

    uri: str
    recordings: tuple[Recording, ...]
    dead_letters: tuple[DeadLetter, ...] = ()
    copies: tuple[Answer, ...] = ()
    ready: tuple[RecordingResult, ...] = ()
