"""Gathers what becomes of the recordings of an audio object while it is decoded and asked about."""

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
    """What became of one recording so far."""

    def __init__(self, recording: Recording, letters: Sequence[DeadLetter], copies: Sequence[Answer]) -> None:
        self.rejected = tuple(letters)
        self._copies = {copy.answer_key: copy for copy in copies}
        self.start(recording)

    def start(self, recording: Recording) -> None:
        """Begins, or begins again with another version of the recording."""
        self.recording = recording
        self.letters = list(self.rejected)
        self._answers: list[Answer] = []
        self._kept: list[Covered] = []
        self._parts: dict[str, list[Answer]] = defaultdict(list)

    def keep(self, covered: Covered) -> None:
        """Takes an answer that an earlier run has written."""
        copy = self._copies.get(covered.answer_key)
        if copy is None:
            self._kept.append(covered)
        else:
            self._answers.append(copy._replace(created_at=now_us()))
        metrics.count("answers_kept")

    def add(self, segment: Segment, task: Task, row: Answer | DeadLetter) -> None:
        """Takes what became of a task of a segment."""
        if isinstance(row, DeadLetter):
            self.letters.append(row)
        elif is_part(segment, task):
            self._parts[task_key(task.name, task.question_id)].append(row)
        else:
            self._answers.append(row)

    def result(self, requested: frozenset[str]) -> RecordingResult:
        """Raises Unaccounted."""
        existing = {found.answer_key: found for found in self.recording.existing.answers}
        for parts in self._parts.values():
            merged = stitch(sorted(parts, key=lambda part: part.segment_index))
            if merged.answer_key in existing:
                self.keep(existing[merged.answer_key])
            else:
                self._answers.append(merged)
        answers = {answer.answer_key: answer for answer in self._answers}  # of two parts, the copy may be the same
        own = {task_key("answer", q.question_id) for q in self.recording.questions if q.question_id}
        return make_result(self.recording, tuple(answers.values()), self.letters, requested | own, kept=self._kept)


class Source(NamedTuple):
    """One piece of audio of an object, and the recordings that are wanted of it: it is decoded and asked once."""

    gathered: tuple[Gathered, ...]

    @property
    def recording(self) -> Recording:
        """The one by which it is decoded."""
        return self.gathered[0].recording


class PendingObject:
    """An object under way: its sources, and how far it is.

    Attributes:
        sources: The pieces of audio wanted of it.
        rejected: Dead letters of recordings that were rejected before, by recording.
        version: How often the object was found to have changed.
        requests: How many have no reply yet.
        is_decoded: Whether all of it is.
        is_cancelled: Whether nobody waits for it any more.
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
        """Drops what was gathered: the object has changed, and is decoded again.

        Args:
            recordings: Those of the sources, one after the other, as the object is now.
        """
        self.version += 1
        renewed = iter(recordings)
        for source in self.sources:
            for gathered in source.gathered:
                gathered.start(next(renewed))

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is under way any more."""
        return self.is_decoded and not self.requests
