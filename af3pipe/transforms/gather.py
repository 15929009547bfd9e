"""Collects answers and dead letters for the recordings of an audio object while it is processed."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from af3pipe.models.tasks import stitch
from af3pipe.schemas import (
    Answer,
    AudioObject,
    Covered,
    DeadLetter,
    Recording,
    RecordingResult,
    Segment,
    Task,
    task_key,
)
from af3pipe.transforms import metrics
from af3pipe.transforms.answer_rows import is_part
from af3pipe.transforms.decode import recordings_of
from af3pipe.transforms.outcome import now_us
from af3pipe.transforms.result import make_result


class Gathered:
    """Collects the answers and dead letters of one recording."""

    def __init__(self, recording: Recording, letters: Sequence[DeadLetter], copies: Sequence[Answer]) -> None:
        self.rejected = tuple(letters)
        self._copies = {copy.answer_key: copy for copy in copies}
        self.start(recording)

    def start(self, recording: Recording) -> None:
        """Drops what was collected, and begins with this version of the recording."""
        self.recording = recording
        self.letters = list(self.rejected)
        self._answers: list[Answer] = []
        self._kept: list[Covered] = []
        self._parts: dict[str, list[Answer]] = defaultdict(list)

    def keep(self, covered: Covered) -> None:
        """Adds an answer that an earlier run wrote."""
        copy = self._copies.get(covered.answer_key)
        if copy is None:
            self._kept.append(covered)
        else:
            self._answers.append(copy._replace(created_at=now_us()))
        metrics.count("answers_kept")

    def add(self, segment: Segment, task: Task, row: Answer | DeadLetter) -> None:
        """Adds the answer or dead letter of a task for a segment."""
        if isinstance(row, DeadLetter):
            self.letters.append(row)
        elif is_part(segment, task):
            self._parts[task_key(task.name, task.question_id)].append(row)
        else:
            self._answers.append(row)

    def result(self, requested: frozenset[str]) -> RecordingResult:
        """Merges the answers of segments and makes the recording's result. Raises Unaccounted."""
        existing = {found.answer_key: found for found in self.recording.existing.answers}
        for parts in self._parts.values():
            merged = stitch(sorted(parts, key=lambda part: part.segment_index))
            if merged.answer_key in existing:
                self.keep(existing[merged.answer_key])
            else:
                self._answers.append(merged)
        answers = {answer.answer_key: answer for answer in self._answers}  # two parts may have the same copy
        own = {task_key("answer", q.question_id) for q in self.recording.questions if q.question_id}
        return make_result(self.recording, tuple(answers.values()), self.letters, requested | own, kept=self._kept)


class Source(NamedTuple):
    """Is one piece of audio of an object with its recordings; it is decoded and run through the model once."""

    gathered: tuple[Gathered, ...]

    @property
    def recording(self) -> Recording:
        """The first recording, by which the audio is decoded."""
        return self.gathered[0].recording


class PendingObject:
    """Tracks the progress of an object: its sources, and the requests about them.

    Attributes:
        sources: The pieces of audio to process.
        rejected: Dead letters of recordings that were rejected before, one list for each recording.
        version: How often processing was restarted with another version of the object.
        requests: Number of requests without a reply.
        is_decoded: Whether the whole object is decoded.
        is_cancelled: Whether its bundle was abandoned.
    """

    def __init__(self, found: AudioObject | Recording) -> None:
        letters: dict[str, list[DeadLetter]] = defaultdict(list)
        copies: dict[str, list[Answer]] = defaultdict(list)
        if isinstance(found, AudioObject):
            for letter in found.dead_letters:
                letters[letter.recording_id].append(letter)
            for copy in found.copies:
                copies[copy.recording_id].append(copy)
        by_source: dict[str, list[Gathered]] = defaultdict(list)
        for recording in recordings_of(found):
            own = recording.recording_id
            by_source[recording.source_key].append(Gathered(recording, letters.pop(own, ()), copies[own]))
        self.sources = [Source(tuple(gathered)) for gathered in by_source.values()]
        self.rejected = list(letters.values())
        self.version = 0
        self.requests = 0
        self.is_decoded = False
        self.is_cancelled = False

    def restart(self, recordings: Sequence[Recording]) -> None:
        """Drops what was collected, because the object has changed and is decoded again.

        Args:
            recordings: Updated recordings of all sources, in order.
        """
        self.version += 1
        renewed = iter(recordings)
        for source in self.sources:
            for gathered in source.gathered:
                gathered.start(next(renewed))

    @property
    def is_done(self) -> bool:
        """Whether it is decoded and no request is waiting for a reply."""
        return self.is_decoded and not self.requests
