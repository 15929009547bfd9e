"""Verifies answers: runs a sample of a run's requests again, one at a time with plain `generate`, and compares."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import apache_beam as beam

from af3pipe.models.engine import EngineFailed
from af3pipe.schemas import DeadLetter, Recording, Reply, Segment, Stage, Task
from af3pipe.transforms.ask import AskAudioFlamingo, AskedRequest, Asker, audio_checksum
from af3pipe.transforms.decode import DecodeAudio, Decoder
from af3pipe.transforms.outcome import outcomes, plain, to_dead_letter

_MOST_REPORTED = 10
_EXCERPT = 120  # characters


class Mismatch(NamedTuple):
    """Describes a reply that differs from the reply of plain `generate`.

    Attributes:
        fields: Fields of `Reply` that differ.
        first_token: Position of the first new token that differs; None if the tokens are equal.
        text: Excerpt of the run's reply, from shortly before the first character that differs.
        alone: The same excerpt of the reply of plain `generate`.
    """

    recording_id: str
    uri: str
    segment_index: int
    task: str
    question_id: str | None
    fields: tuple[str, ...]
    first_token: int | None
    text: str
    alone: str


class NotAsked(NamedTuple):
    """Describes a sampled request that could not be repeated, and why."""

    recording_id: str
    uri: str
    segment_index: int
    detail: str


class Verified(NamedTuple):
    """Reports the verification of a sample of requests.

    Attributes:
        sampled: Number of sampled requests; those that could not be repeated are in no other count.
        requests: Number of requests that were repeated.
        replies: Number of compared replies, one for each task of a request.
        equal: Replies that are equal to the last token.
        wrong: Replies that differ although they must be equal: in float32 with unquantized weights.
        dtypes: The model's dtypes, with the weights' number format if they are quantized.
        mismatches: The first 10 mismatches.
        not_asked: The first 10 requests that could not be repeated.
    """

    sampled: int = 0
    requests: int = 0
    replies: int = 0
    equal: int = 0
    wrong: int = 0
    dtypes: tuple[str, ...] = ()
    mismatches: tuple[Mismatch, ...] = ()
    not_asked: tuple[NotAsked, ...] = ()

    @property
    def problem(self) -> str | None:
        """A sentence that says why verification failed; None if it did not."""
        if self.wrong:
            said = f"{self.wrong} of {self.replies} replies differ from those of plain generate"
            return "; ".join([said, *(_describe(found) for found in self.mismatches[:1])])
        if self.sampled and not self.requests:
            first = f", for example {self.not_asked[0].uri}: {self.not_asked[0].detail}"
            return f"none of {self.sampled} sampled requests could be repeated{first}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as a dict that can be dumped to JSON."""
        found: dict[str, Any] = plain(self)
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Verified":
        """Restores a report from the result of `to_dict`, also after a round trip through JSON."""
        rows = {
            "dtypes": tuple(found["dtypes"]),
            "mismatches": tuple(Mismatch(**row | {"fields": tuple(row["fields"])}) for row in found["mismatches"]),
            "not_asked": tuple(NotAsked(**row) for row in found["not_asked"]),
        }
        return cls(**{**found, **rows})


def total(parts: Iterable[Verified]) -> Verified:
    """Merges reports; keeps the first 10 mismatches and unrepeated requests, ordered by recording and segment."""
    parts = list(parts)
    counts = {name: sum(getattr(part, name) for part in parts) for name in Verified._fields[:5]}
    return Verified(
        **counts,
        dtypes=tuple(sorted({dtype for part in parts for dtype in part.dtypes})),
        mismatches=tuple(sorted((row for part in parts for row in part.mismatches), key=_place)[:_MOST_REPORTED]),
        not_asked=tuple(sorted((row for part in parts for row in part.not_asked), key=_place)[:_MOST_REPORTED]),
    )


def compare(asked: AskedRequest, tasks: Sequence[Task], alone: Sequence[Reply]) -> tuple[Mismatch, ...]:
    """Compares the replies of a request with those of plain `generate` (`alone`); returns the mismatches.

    Raises:
        EngineFailed: The number of replies is not the number of tasks.
    """
    if not len(tasks) == len(asked.replies) == len(alone):
        given = f"{len(asked.replies)} replies to {len(tasks)} tasks, and {len(alone)} when they were repeated"
        raise EngineFailed(f"the engine returned {given}")
    found = []
    for task, reply, other in zip(tasks, asked.replies, alone, strict=True):
        if reply == other:
            continue
        begin = max(0, _first_difference(reply.text, other.text) - _EXCERPT // 3)
        found.append(
            Mismatch(
                recording_id=asked.recording.recording_id,
                uri=asked.recording.uri,
                segment_index=asked.segment_index,
                task=task.name,
                question_id=task.question_id,
                fields=tuple(name for name in Reply._fields if getattr(reply, name) != getattr(other, name)),
                first_token=None if reply.tokens == other.tokens else _first_difference(reply.tokens, other.tokens),
                text=_excerpt(reply.text, begin),
                alone=_excerpt(other.text, begin),
            )
        )
    return tuple(found)


def _first_difference(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Returns the first position that differs; the length of the shorter one if it is a prefix of the other."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def _excerpt(text: str, begin: int) -> str:
    end = begin + _EXCERPT
    return ("..." if begin else "") + text[begin:end] + ("..." if len(text) > end else "")


def _place(row: Mismatch | NotAsked) -> tuple[Any, ...]:
    return (
        row.recording_id,
        row.segment_index,
        *((row.task, row.question_id or "") if isinstance(row, Mismatch) else ()),
    )


def _describe(found: Mismatch) -> str:
    where = f"{found.uri} (segment {found.segment_index}, task {found.task!r})"
    differs = ", ".join(found.fields) if found.first_token is None else f"token {found.first_token}"
    return f"for example {where} from {differs} on: {found.text!r}, but alone {found.alone!r}"


class VerifyDoFn(beam.DoFn):
    """Repeats the requests of one recording, given as a list of `AskedRequest`; emits a `Verified` for each.

    Decodes the recording with the same settings, up to the last segment that is needed. Requests are not pipelined:
    one segment is in memory and one request is running at a time.
    """

    def __init__(self, decoder: Decoder, asker: Asker) -> None:
        self._decoder = decoder
        self._asker = asker

    def setup(self) -> None:
        self._decoder.setup()
        self._asker.setup()

    def teardown(self) -> None:
        self._asker.close()
        self._decoder.close()

    def process(self, group: list[AskedRequest]) -> Iterator[Verified]:
        recording = group[0].recording
        missing = {asked.segment_index: asked for asked in group}
        detail = "the recording no longer has this segment; was the file replaced meanwhile?"

        def unread(error: Exception) -> DeadLetter:
            return to_dead_letter(error, recording, stage=Stage.DECODE)

        with closing(outcomes(self._decoder.segments_of(recording), unread)) as segments:
            for segment in segments:
                if isinstance(segment, DeadLetter):
                    detail = _detail(segment)
                elif segment.segment_index in missing:
                    yield self._verify(missing.pop(segment.segment_index), segment)
                if not missing:
                    break
        for asked in missing.values():
            yield _not_asked(asked, detail)

    def _verify(self, asked: AskedRequest, segment: Segment) -> Verified:
        request = self._asker.request(segment, asked.tasks)
        if audio_checksum(request) != asked.checksum:
            return _not_asked(asked, "its audio differs from that of the run; was the file replaced meanwhile?")

        def lost(error: Exception) -> DeadLetter:
            return to_dead_letter(error, segment.recording, stage=Stage.GENERATE, segment=segment)

        (replies,) = outcomes((self._asker.engine().ask_alone(request).result() for _ in range(1)), lost)
        if isinstance(replies, DeadLetter):
            return _not_asked(asked, _detail(replies))
        mismatches = compare(asked, request.tasks, replies)
        dtype, quantize = self._asker.engine().info.dtype, self._asker.options.quantize
        must_be_equal = (dtype, quantize) == ("float32", "none")
        return Verified(
            sampled=1,
            requests=1,
            replies=len(replies),
            equal=len(replies) - len(mismatches),
            wrong=len(mismatches) if must_be_equal else 0,
            dtypes=(dtype if quantize == "none" else f"{dtype}, weights {quantize}",),
            mismatches=mismatches,
        )


def _detail(letter: DeadLetter) -> str:
    return f"{letter.reason.value}: {letter.detail}"


def _not_asked(asked: AskedRequest, detail: str) -> Verified:
    recording = asked.recording
    missed = NotAsked(recording.recording_id, recording.uri, asked.segment_index, detail)
    return Verified(sampled=1, not_asked=(missed,))


def _by_recording(sample: Iterable[AskedRequest]) -> Iterator[list[AskedRequest]]:
    groups: dict[Recording, list[AskedRequest]] = defaultdict(list)
    for asked in sample:
        groups[asked.recording].append(asked)
    yield from groups.values()


class VerifyAnswers(beam.PTransform):
    """Runs a random sample of a run's requests again, one at a time with plain `generate`, and compares the replies.

    The input is the `asked` output of `AnswerRecordings(verifiable=True)`, `AskedRequest`s; the output is one
    `Verified`. The sample is uniform over all answered requests of the run; its recordings are read and decoded
    again. Replies are shuffled, audio is not.

    Args:
        decode: The transform that decoded the recordings.
        ask: The transform that has the tasks and engine.
        sample: Number of requests; all of them if there are fewer.
        accelerator: Beam's resource hint for the step that runs the model, see `AnswerRecordings`.

    Raises:
        ValueError: `sample` is less than 1.
    """

    def __init__(
        self, decode: DecodeAudio, ask: AskAudioFlamingo, *, sample: int, accelerator: str | None = None
    ) -> None:
        super().__init__()
        if sample < 1:
            raise ValueError(f"sample is {sample}; it must be at least 1 request")
        self._dofn = VerifyDoFn(decode.decoder, ask.asker)
        self._sample = sample
        self._hints = {"accelerator": accelerator} if accelerator else {}

    def expand(self, asked: Any) -> Any:
        return (
            asked
            | "Sample" >> beam.combiners.Sample.FixedSizeGlobally(self._sample)
            | "ByRecording" >> beam.FlatMap(_by_recording).with_output_types(list[AskedRequest])
            | "Spread" >> beam.Reshuffle()
            | "AskAlone" >> beam.ParDo(self._dofn).with_output_types(Verified).with_resource_hints(**self._hints)
            | "Total" >> beam.CombineGlobally(total)
        )
