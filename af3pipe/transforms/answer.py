"""Answers recordings: one DoFn decodes audio objects, runs the model on their segments, and emits results."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from af3pipe import storage
from af3pipe.audio.recording import OverLength
from af3pipe.models.family import DEFAULT_MODEL
from af3pipe.schemas import (
    AudioObject,
    DeadLetter,
    Existing,
    Reason,
    Recording,
    RecordingResult,
    Rejected,
    Reply,
    Segment,
    Stage,
    Task,
    task_key,
)
from af3pipe.transforms import metrics
from af3pipe.transforms.answer_rows import Wanted, wanted_of
from af3pipe.transforms.ask import AskAudioFlamingo, AskedRequest, Asker, audio_checksum
from af3pipe.transforms.decode import DecodeAudio, Decoder, as_stored, stated
from af3pipe.transforms.gather import PendingObject, Source
from af3pipe.transforms.launcher import SentByLauncher
from af3pipe.transforms.outcome import FATAL, to_dead_letter
from af3pipe.transforms.plan import WorkKeys
from af3pipe.transforms.result import rejected_result
from af3pipe.transforms.stores import count_retries

ASKED = "asked"
"""Tag of the output with the `AskedRequest`s that `VerifyAnswers` samples."""
_FIRST_READS = 100
"""If a worker's first 100 recordings are all permission_denied, most likely its credentials are wrong."""


class _Request(NamedTuple):
    """Is a request about a segment that was submitted to the engine.

    Attributes:
        version: Version of the object, see `PendingObject`.
        wanted: For each recording of the source, the tasks to request.
        tasks: The distinct tasks of all recordings.
    """

    pending: PendingObject
    version: int
    source: Source
    segment: Segment
    wanted: tuple[Wanted, ...]
    tasks: tuple[Task, ...]
    future: "Future[list[Reply]]"


class _Decoded(NamedTuple):
    """Is an event from a decoding thread: a segment or rejection of a source; with neither, the end of the object.

    Attributes:
        renewed: The updated recordings of all sources, if the object has changed since it was listed (`part` says
            why) or was stated only now; decoding starts again from the beginning.
    """

    pending: PendingObject
    source: Source | None = None
    part: Segment | Exception | None = None
    renewed: tuple[Recording, ...] | None = None


_Event: TypeAlias = "_Decoded | _Request | BaseException"


class AnswerDoFn(SentByLauncher, beam.DoFn):
    """Turns an `AudioObject` or `Recording` into a `RecordingResult` per recording; emits `AskedRequest`s to a tag.

    Threads decode objects, opening each once, while the engine processes segments that were decoded before. Memory is
    bounded by the number of open objects, one or two decoded segments per thread, and the number and seconds of audio
    of requests at the engine. All results of an object are emitted when it is finished.

    Args:
        decoder: Decodes objects.
        asker: Runs the model on their segments.
        verifiable: Whether to emit `AskedRequest`s.
    """

    def __init__(self, decoder: Decoder, asker: Asker, *, verifiable: bool = False) -> None:
        self._decoder = decoder
        self._asker = asker
        self._verifiable = verifiable
        self._requested = frozenset(task_key(task.name, task.question_id) for task in asker.requested)
        self._open: list[PendingObject] = []
        self._first_results = self._first_refused = 0

    def setup(self) -> None:
        self._decoder.setup()
        self._asker.setup()
        self._pool = ThreadPoolExecutor(self._decoder.threads, thread_name_prefix="af3pipe-decode")

    def teardown(self) -> None:
        self._abandon()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._asker.close()
        self._decoder.close()

    def start_bundle(self) -> None:
        self._abandon()  # work of a failed bundle, whose elements are processed again
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._waiting: deque[_Decoded] = deque()
        self._requests: dict[Future[list[Reply]], _Request] = {}
        self._audio_s = 0.0
        # A thread that has decoded a segment waits here until a request is made of it.
        self._room = threading.Semaphore(self._decoder.threads)

    def process(self, found: AudioObject | Recording) -> Iterator[Any]:
        pending = PendingObject(found)
        for letters in pending.rejected:
            yield self._emitted(rejected_result(letters))
        for result in found.ready if isinstance(found, AudioObject) else ():
            yield self._emitted(result)
        if not pending.sources:
            return
        # Twice as many objects as threads, so that a thread that has finished one finds the next.
        while len(self._open) >= 2 * self._decoder.threads:
            yield from self._advance()
        self._open.append(pending)
        self._pool.submit(self._decode, pending, self._events, self._room)
        while not self._events.empty() or (self._waiting and not self._is_full(self._waiting[0])):
            yield from self._advance()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        while self._open:
            yield from self._advance()
        count_retries()

    def _decode(self, pending: PendingObject, events: "SimpleQueue[_Event]", room: threading.Semaphore) -> None:
        """Decodes an object on a thread of the pool; puts what it yields, or an exception, into `events`."""
        try:
            for event in self._decoded(pending):
                if event.source is not None:
                    while not room.acquire(timeout=1.0):
                        if pending.is_cancelled:
                            return
                if pending.is_cancelled:
                    return
                events.put(event)
                del event  # else it stays in memory while the next one is decoded
        except BaseException as error:  # noqa: BLE001 - raised again on the bundle's thread
            events.put(error)

    def _decoded(self, pending: PendingObject) -> Iterator[_Decoded]:
        """Decodes an object; if it changes meanwhile, decodes its new version once."""
        gathered = [one for source in pending.sources for one in source.gathered]
        listed = recordings = [one.recording for one in gathered]
        try:
            recordings = list(stated(listed))
            if recordings != listed:
                yield _Decoded(pending, renewed=tuple(recordings))
            yield from self._parts(pending, recordings)
        except Rejected as rejected:
            failure = rejected
        else:
            return
        try:
            if failure.reason is not Reason.CHANGED:
                raise failure
            info = storage.stat(recordings[0].uri)
            renewed = [self._renewed(one.recording, info, one.rejected) for one in gathered]
            yield _Decoded(pending, None, failure, tuple(renewed))
            yield from self._parts(pending, renewed)
        except Rejected as rejected:  # it changed again, or cannot be read
            if rejected is not failure:
                detail = f"{failure.detail} When it was read again: {rejected.detail}"
                rejected = Rejected(rejected.stage, rejected.reason, detail)
            yield _Decoded(pending, renewed=tuple(recordings))
            for source in pending.sources:
                yield _Decoded(pending, source, rejected)
            yield _Decoded(pending)

    def _parts(self, pending: PendingObject, recordings: Sequence[Recording]) -> Iterator[_Decoded]:
        by_source = {recording.source_key: recording for recording in reversed(recordings)}
        wanted = [by_source[source.recording.source_key] for source in pending.sources]
        for index, part in self._decoder.parts_of(wanted):
            yield _Decoded(pending, pending.sources[index], part)
        yield _Decoded(pending)

    def _renewed(self, recording: Recording, info: storage.ObjectInfo, letters: Sequence[DeadLetter]) -> Recording:
        """Updates a recording to the current version of its object, about which earlier runs have no rows."""
        renewed = as_stored(recording, info)._replace(existing=Existing())
        if recording.work_key is None:
            return renewed
        return WorkKeys(self._decoder, self._asker).add(renewed, letters)

    def _advance(self) -> Iterator[Any]:
        """Processes the next event, waiting for one if necessary; yields finished results."""
        if self._waiting and not self._is_full(self._waiting[0]):
            yield from self._take(self._waiting.popleft())
            return
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, _Request):
            del self._requests[event.future]
            self._audio_s -= event.segment.audio_s
            yield from self._gather(event)
            yield from self._finished(event.pending)
        elif self._waiting or self._is_full(event):
            self._waiting.append(event)
        else:
            yield from self._take(event)

    def _is_full(self, decoded: _Decoded) -> bool:
        if not isinstance(decoded.part, Segment) or not self._requests:
            return False
        most, most_s = self._asker.most_pending
        return len(self._requests) >= most or self._audio_s + decoded.part.audio_s > most_s

    def _take(self, decoded: _Decoded) -> Iterator[Any]:
        pending, source, part, renewed = decoded
        if renewed is not None:
            metrics.count("objects_changed", 0 if part is None else 1)
            pending.restart(renewed)
        elif source is None:
            pending.is_decoded = True
        else:
            self._room.release()
            if isinstance(part, Segment):
                self._request(pending, source, part)
            elif part is not None:
                for gathered in source.gathered:
                    gathered.letters.append(to_dead_letter(part, gathered.recording, stage=Stage.DECODE))
        yield from self._finished(pending)

    def _request(self, pending: PendingObject, source: Source, segment: Segment) -> None:
        wanted = []
        for gathered in source.gathered:
            own = segment._replace(recording=gathered.recording)
            if (letter := self._decoder.silent(own)) is not None:
                gathered.letters.append(letter)
                continue
            found = wanted_of(own, self._asker.tasks_of(gathered.recording), self._asker.model)
            for covered in found.kept.values():
                gathered.keep(covered)
            wanted.append(found)
        metrics.count("segments", 1 if wanted else 0)
        self._submit(pending, source, segment, tuple(wanted))

    def _submit(self, pending: PendingObject, source: Source, segment: Segment, wanted: tuple[Wanted, ...]) -> None:
        """Starts one request for all recordings of a source."""
        tasks = tuple(dict.fromkeys(task for found in wanted for task in found.tasks))
        if not tasks:
            return
        future = self._asker.submit(segment, tasks)
        request = _Request(pending, pending.version, source, segment, wanted, tasks, future)
        self._requests[future] = request
        self._audio_s += segment.audio_s
        pending.requests += 1
        events = self._events
        future.add_done_callback(lambda _: events.put(request))

    def _gather(self, request: _Request) -> Iterator[Any]:
        """Adds the replies to a request to its recordings; if it failed, dead letters to those that need a reply."""
        request.pending.requests -= 1
        if request.version != request.pending.version:
            return  # the object has changed since
        segment, tasks = request.segment, request.tasks
        recipients = list(zip(request.source.gathered, request.wanted, strict=True))
        try:
            replies = self._asker.replies(segment, tasks, request.future)
        except FATAL:
            raise
        except Exception as error:  # noqa: BLE001 - a request may fail in any way; none may end the job
            if len(recipients) > 1:  # one recording's question must not cost another its answers
                for gathered, wanted in recipients:
                    self._submit(request.pending, Source((gathered,)), segment, (wanted,))
                return
            for gathered, wanted in recipients:
                if wanted.new:
                    recording, lost = gathered.recording, wanted.new
                    letter = to_dead_letter(error, recording, stage=Stage.GENERATE, segment=segment, tasks=lost)
                    gathered.letters.append(letter)
            return
        finally:
            self._asker.count()
        if self._verifiable:
            checksum = audio_checksum(self._asker.request(segment, tasks))
            recording = request.source.recording._replace(existing=Existing())
            asked = AskedRequest(recording, segment.segment_index, checksum, tasks, tuple(replies))
            yield TaggedOutput(ASKED, WindowedValue(asked, Timestamp.of(0), (GlobalWindow(),)))
        by_task = dict(zip(tasks, replies, strict=True))
        for gathered, wanted in recipients:
            own = segment._replace(recording=gathered.recording)
            for task in wanted.new:
                gathered.add(own, task, self._asker.answer(own, task, by_task[task]))

    def _finished(self, pending: PendingObject) -> Iterator[WindowedValue]:
        if not pending.is_done:
            return
        self._open.remove(pending)
        for source in pending.sources:
            for gathered in source.gathered:
                yield self._emitted(gathered.result(self._requested))

    def _emitted(self, result: RecordingResult) -> WindowedValue:
        """Counts a result and adds its timestamp."""
        row = result.row
        metrics.count("recordings_done")
        metrics.count(f"recordings_{row.terminal_state.value}")
        metrics.count("answers", len(result.answers))
        for letter in result.dead_letters:
            metrics.count(f"dead_letters_{letter.reason.value}")
        if self._first_results < _FIRST_READS:
            self._first_results += 1
            self._first_refused += row.reasons == (Reason.PERMISSION_DENIED.value,) and not row.answer_keys
            if self._first_refused == _FIRST_READS:
                metrics.count("workers_refused")
        return WindowedValue(result, event_time(result), (GlobalWindow(),))

    def _abandon(self) -> None:
        for pending in self._open:
            pending.is_cancelled = True
        for future in getattr(self, "_requests", ()):
            future.cancel()
        self._open.clear()


def event_time(result: RecordingResult) -> Timestamp:
    """Returns the modification time of the object; if its store has none, the creation time of the result's row.

    Times before 1970 are epochs of other systems (1601, 1904): they become 1970, since elements that are more than a
    hundred years late are dropped.
    """
    mtime = result.row.mtime
    at_s = datetime.fromisoformat(mtime).timestamp() if mtime else result.row.created_at / 1e6
    return Timestamp.of(max(0.0, at_s))


class Verifiable(NamedTuple):
    """Has the PCollections of `RecordingResult`s, and of the `AskedRequest`s that `VerifyAnswers` samples."""

    results: Any
    asked: Any


class AnswerRecordings(beam.PTransform):
    """Answers recordings: decodes audio objects, runs the model on them, and outputs the result of each recording.

    The input is `AudioObject` (from `ReadRecordings`) or `Recording`, in the global window; the output is a
    `RecordingResult` for each recording, with its object's modification time as timestamp. Everything is one DoFn:
    audio is neither shuffled nor sent over the network.

        results = p | ReadRecordings("s3://archive/**/*.flac") | AnswerRecordings(tasks=[caption(), transcript()])

    Args:
        model: Hub id, local directory, or `demo`. The released weights are for non-commercial use, and so are
            adapters made from them.
        tasks: Tasks for every recording; a recording's own questions are added.
        revision: Branch, tag or commit of the model on the hub.
        over_length: See `DecodeAudio`.
        decode: Configures decoding in full; its `model`, `revision` and `over_length` replace those given here.
        ask: Configures tasks and engine in full; its `model`, `revision` and `tasks` replace those given here.
        verifiable: Whether the output is a `Verifiable`, for `VerifyAnswers`.
        accelerator: Beam's accelerator resource hint, for example `type:nvidia-l4;count:1;install-nvidia-driver`.

    Raises:
        ValueError: There is no task, two have the same name and question, or a follow-up lacks its question.
    """

    def __init__(
        self,
        *,
        model: str = DEFAULT_MODEL,
        tasks: Sequence[Task] = (),
        revision: str | None = None,
        over_length: OverLength = "dead-letter",
        decode: DecodeAudio | None = None,
        ask: AskAudioFlamingo | None = None,
        verifiable: bool = False,
        accelerator: str | None = None,
    ) -> None:
        super().__init__()
        ask = ask or AskAudioFlamingo(model=model, tasks=tasks, revision=revision)
        decode = decode or DecodeAudio(model=model, revision=revision, over_length=over_length)
        self._dofn = AnswerDoFn(decode.decoder, ask.asker, verifiable=verifiable)
        self._verifiable = verifiable
        self._hints = {"accelerator": accelerator} if accelerator else {}

    def expand(self, objects: Any) -> Any:
        answer = beam.ParDo(self._dofn)
        if not self._verifiable:
            answer = answer.with_output_types(RecordingResult).with_resource_hints(**self._hints)
            return objects | "Answer" >> answer
        answer = answer.with_output_types(RecordingResult, **{ASKED: AskedRequest}).with_resource_hints(**self._hints)
        answered = objects | "Answer" >> answer.with_outputs(ASKED, main="results")
        return Verifiable(answered.results, answered[ASKED])
