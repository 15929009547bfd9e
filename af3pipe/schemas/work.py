"""The unit of work, an audio object with the recordings wanted of it; and a recording's result."""

from typing import NamedTuple

from af3pipe.schemas.answer import Answer
from af3pipe.schemas.dead_letter import DeadLetter
from af3pipe.schemas.recording import Recording, RecordingRow


class RecordingResult(NamedTuple):
    """All that became of a recording in a run: its row, its new answers and its new dead letters.

    Attributes:
        row: Of `recordings/`.
        answers: Rows of `captions/`, `transcripts/` and `answers/` that no earlier run has written.
        dead_letters: Rows of `dead_letters/` that no earlier run has written.
    """

    row: RecordingRow
    answers: tuple[Answer, ...] = ()
    dead_letters: tuple[DeadLetter, ...] = ()


class AudioObject(NamedTuple):
    """An object in a store and all recordings wanted of it: it is opened and decoded once for all of them.

    Attributes:
        uri: Of the object; of what was rejected where there is no recording.
        recordings: Parts of this one object, or all of it; none where each was rejected.
        dead_letters: Of recordings that were rejected before they were opened, and of other manifest rows with the
            same `recording_id` as one of `recordings`.
        copies: Answers that an earlier run has written for the same audio under another `recording_id` or with other
            metadata, as rows of one of `recordings`: where one is to a request of this run, it is written instead of
            running the model again.
        ready: Results of further recordings of it, which need no audio: an earlier run has done the same, but a later
            one something else, which is no longer the latest now.
    """

    uri: str
    recordings: tuple[Recording, ...]
    dead_letters: tuple[DeadLetter, ...] = ()
    copies: tuple[Answer, ...] = ()
    ready: tuple[RecordingResult, ...] = ()
