"""A sample of a run's requests asked again, one at a time, by plain `generate`."""

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

_MOST_TOLD = 10
_EXCERPT = 120  # characters


class Mismatch(NamedTuple):
    """A reply that plain `generate` does not give.

    Attributes:
        fields: Of `Reply`, those that differ.
        first_token: Position of the first new token that differs; None where the tokens are the same.
        text: Of the run's reply, from shortly before the first character that differs.
        alone: Of the reply by plain `generate`, from there.
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
    """A request of the sample that could not be asked again, and why."""

    recording_id: str
    uri: str
    segment_index: int
    detail: str


class Verified(NamedTuple):
    """What became of a sample of requests.

    Attributes:
        sampled: Requests to be asked again; those that could not be are in no other count.
        requests: Asked again.
        replies: Compared; a request has one a task.
        equal: The same to the last token.
        wrong: Not equal where nothing else is right: in float32, with the weights as they are.
        dtypes: The model was asked in, with the weights' where these are quantised.
        mismatches: The first 10.
        not_asked: The first 10.
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
        """Why the run's answers are not to be trusted, in a sentence; None where nothing speaks against them."""
        if self.wrong:
            said = f"{self.wrong} of {self.replies} replies are not what plain generate gives"
            return "; ".join([said, *(_describe(found) for found in self.mismatches[:1])])
        if self.sampled and not self.requests:
            first = f", for example {self.not_asked[0].uri}: {self.not_asked[0].detail}"
            return f"none of {self.sampled} requests could be asked again{first}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        found: dict[str, Any] = plain(self)
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Verified":
        """What `to_dict` gave, after its way through JSON."""
        rows = {
            "dtypes": tuple(found["dtypes"]),
            "mismatches": tuple(Mismatch(**row | {"fields": tuple(row["fields"])}) for row in found["mismatches"]),
            "not_asked": tuple(NotAsked(**row) for row in found["not_asked"]),
        }
        return cls(**{**found, **rows})


def total(parts: Iterable[Verified]) -> Verified:
    """All of them in one; of what they list, the first by recording and segment."""
    parts = list(parts)
    counts = {name: sum(getattr(part, name) for part in parts) for name in Verified._fields[:5]}
    return Verified(
        **counts,
        dtypes=tuple(sorted({dtype for part in parts for dtype in part.dtypes})),
        mismatches=tuple(sorted((row for part in parts for row in part.mismatches), key=_place)[:_MOST_TOLD]),
        not_asked=tuple(sorted((row for part in parts for row in part.not_asked), key=_place)[:_MOST_TOLD]),
    )


def compare(asked: AskedRequest, tasks: Sequence[Task], alone: Sequence[Reply]) -> tuple[Mismatch, ...]:
    """The replies of a request that plain `generate` does not give; `alone` are those that it gives.

    Raises:
        EngineFailed: There is not one reply per task.
    """
    if not len(tasks) == len(asked.replies) == len(alone):
        given = f"{len(asked.replies)} replies to {len(tasks)} tasks, and {len(alone)} when asked alone"
        raise EngineFailed(f"the engine gave {given}")
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
    """Position; where one is the beginning of the other, its length."""
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
    """Takes the requests of one recording, as a list of `AskedRequest`; emits a `Verified` for each.

    Decodes the recording as it was decoded, up to the last segment that is needed. Nothing is asked ahead: there is
    one segment in memory, and one reply under way.
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
        detail = "the recording has no such segment any more; was it replaced meanwhile?"

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
            return _not_asked(asked, "its audio is not what was heard in the run; was the file replaced meanwhile?")

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
    """Asks some of a run's requests again, one at a time by plain `generate`, and compares the replies.

    Takes the `asked` of `AnswerRecordings(verifiable=True)`, `AskedRequest`s; gives one `Verified`. The sample is
    drawn from all requests of the run that were answered, each as likely as the other; the recordings in it are read
    and decoded once more. What is shuffled are replies, never audio.

    Args:
        decode: How the recordings were decoded.
        ask: What was asked.
        sample: How many requests; all of them where there are fewer.
        accelerator: Beam's resource hint, as of `AnswerRecordings`, for the step that asks.

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
