"""Builds the graph of a job: recordings in, Parquet out. Needs neither torch nor the model's weights."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindows

from af3pipe.audio.guarded import DecoderLimits
from af3pipe.models.tasks import DEFAULT_QUESTION_TOKENS
from af3pipe.pipelines.handover import found_uri, verified_uri, write_found, write_verified
from af3pipe.pipelines.job import JobConfig
from af3pipe.schemas import AudioObject, DeadLetter, Recording
from af3pipe.tables.run_record import ended_uri, stop_uri
from af3pipe.transforms import (
    AcknowledgeMessages,
    AnswerRecordings,
    AskAudioFlamingo,
    DecodeAudio,
    Notified,
    Outcome,
    ReadNotifications,
    VerifyAnswers,
    WatchRecordings,
)
from af3pipe.transforms.ended import TellEnd
from af3pipe.transforms.inputs.dedup import Once
from af3pipe.transforms.inputs.pubsub import is_subscription, subscription_of
from af3pipe.transforms.inputs.read import ListRecordings, list_recordings
from af3pipe.transforms.launcher import CheckWorkers
from af3pipe.transforms.plan import PlanObjects
from af3pipe.transforms.resume import PlanStream, ReadExisting
from af3pipe.transforms.write import WriteRows
from af3pipe.transforms.written import NotWritten, ReadWritten

_HELD_S = 600.0
"""So long a worker of a batch holds results at most before it writes them: what is lost with it."""
_LEASE_S = 60
"""What a watch that died had of messages comes again after so long."""


class Asking(NamedTuple):
    """How a job's recordings are decoded and what is asked of them."""

    decode: DecodeAudio
    ask: AskAudioFlamingo


def asking(job: JobConfig, *, keep_engine: bool = False) -> Asking:
    """The two transforms that do the work.

    Args:
        job: What is asked.
        keep_engine: As of `AskAudioFlamingo`.
    """
    decode = DecodeAudio(
        model=job.model,
        revision=job.revision,
        over_length=job.over_length,
        split_at=job.split_at,
        split_tolerance_s=job.split_tolerance_s,
        on_silent=job.on_silent,
        silent_below_dbfs=job.silent_below,
        threads=job.decode_threads,
        guard=DecoderLimits(job.decode_timeout_s, job.decode_memory_mib) if job.decode_guard else None,
        storage_options=job.storage_options,
    )
    ask = AskAudioFlamingo(
        model=job.model,
        tasks=job.all_tasks(),
        revision=job.revision,
        engine=job.engine,
        dtype=job.dtype,
        device=job.device,
        slots=job.slots,
        queue_audio_s=job.queue_audio_s,
        question_tokens=job.max_new_tokens or DEFAULT_QUESTION_TOKENS,
        question_think=job.think,
        attention=job.attention,
        cuda_graphs=job.cuda_graphs,
        adapter=job.adapter,
        quantize=job.quantize,
        keep_engine=keep_engine,
    )
    return Asking(decode, ask)


def found_by(job: JobConfig, name: str) -> Iterator[Recording | DeadLetter]:
    """What the job finds under a name."""
    return list_recordings(
        name, channel=job.channel, stream=job.stream, allow_prefixes=job.allow_prefixes, exclude=[job.output]
    )


def build(pipeline: beam.Pipeline, job: JobConfig, run_id: str) -> None:
    """Builds the whole job, from listing on, for remote workers."""
    how = asking(job, keep_engine=True)
    inputs = pipeline | "CheckWorkers" >> CheckWorkers(job.inputs)
    listed = inputs | "ListRecordings" >> ListRecordings(
        channel=job.channel,
        stream=job.stream,
        allow_prefixes=job.allow_prefixes,
        exclude=[job.output],
        storage_options=job.storage_options,
    )
    existing = None
    if job.resume:
        existing = pipeline | "ReadExisting" >> ReadExisting(job.output, run_id, dict(job.storage_options))
    planned = listed | "PlanObjects" >> PlanObjects(
        existing=existing,
        decoder=how.decode.decoder,
        asker=how.ask.asker,
        storage_options=job.storage_options,
    )
    _ = planned | "CountFound" >> _CountFound(job, run_id)
    _answer_and_write(planned.objects, how, job, run_id, chunk=0)


def build_chunk(
    pipeline: beam.Pipeline,
    job: JobConfig,
    run_id: str,
    planned: Sequence[AudioObject],
    number: int,
    *,
    here: bool,
) -> None:
    """Builds the job for objects that are planned.

    Args:
        pipeline: Where to.
        job: What to do; its `verify_sample` is this chunk's.
        run_id: Names the run.
        planned: What there is to do.
        number: Of the chunk.
        here: Whether it runs in this process; else its objects are spread over workers.
    """
    create = beam.Create(planned, reshuffle=not here).with_output_types(AudioObject)
    objects = pipeline | "Planned" >> create
    _answer_and_write(objects, asking(job, keep_engine=not here), job, run_id, chunk=number, here=here)


def build_stream(pipeline: beam.Pipeline, job: JobConfig, run_id: str, *, tell_end: bool = False) -> None:
    """Builds the job as a stream that ends when it is stopped: folders are watched, subscriptions are read.

    Args:
        pipeline: Where to.
        job: What to do.
        run_id: Names the run.
        tell_end: Whether the last step signals completion when all is written.
    """
    how = asking(job, keep_engine=True)
    _ = pipeline | "CheckWorkers" >> CheckWorkers(job.inputs)
    found, waiting = _found_in_stream(pipeline, job, run_id)
    plan = PlanStream(
        job.output if job.resume else None, how.decode.decoder, how.ask.asker, dict(job.storage_options)
    )
    planned = found | "PlanStream" >> plan
    written = (
        planned.objects
        | "SpreadObjects" >> beam.Reshuffle()
        | "AnswerRecordings" >> AnswerRecordings(decode=how.decode, ask=how.ask, accelerator=job.accelerator)
        | "WriteRows"
        >> WriteRows(
            job.output,
            run_id=run_id,
            window_s=job.watch.window,
            pane_every_s=job.watch.pane_every,
            shards=job.watch.shards,
            partition_by=job.partition_by,
            storage_options=job.storage_options,
        )
    )
    last = written
    if waiting is not None:
        durable = (
            written | "WrittenEver" >> beam.WindowInto(GlobalWindows()),  # as the others' windows
            planned.skipped,
        ) | "Durable" >> beam.Flatten()
        last = {"waiting": waiting, "durable": durable} | "AcknowledgeMessages" >> AcknowledgeMessages(
            ack_deadline_s=_LEASE_S
        )
    if tell_end:
        _ = last | "TellEnd" >> TellEnd(ended_uri(job.output, run_id), storage_options=job.storage_options)


def _found_in_stream(pipeline: beam.Pipeline, job: JobConfig, run_id: str) -> tuple[Outcome, Any]:
    """What all inputs find, and the messages that wait for it; None where no subscription is read."""
    how: dict[str, Any] = {
        "channel": job.channel,
        "stream": job.stream,
        "stop_uri": stop_uri(job.output, run_id),
        "stop_after_s": job.watch.stop_after,
        "storage_options": job.storage_options,
    }
    folders = [name for name in job.inputs if not is_subscription(name)]
    notified: list[Notified] = [
        pipeline
        | f"ReadNotifications_{number}"
        >> ReadNotifications(subscription_of(name), allow_prefixes=job.allow_prefixes, **how)
        for number, name in enumerate(dict.fromkeys(filter(is_subscription, job.inputs)))
    ]
    found = [Outcome(one.good, one.dead_letters) for one in notified]
    if folders:
        watch = WatchRecordings(folders, every_s=job.watch.every, exclude=[job.output], **how)
        found.append(pipeline | "WatchRecordings" >> watch)
    waiting = [one.waiting for one in notified] | "AllWaiting" >> beam.Flatten() if notified else None
    if len(found) == 1:
        return found[0], waiting
    good = [one.good for one in found] | "AllFound" >> beam.Flatten()
    letters = [one.dead_letters for one in found] | "AllRejected" >> beam.Flatten()
    return Outcome(good, letters) | "Once" >> Once(), waiting  # several may tell of the same


def _answer_and_write(
    objects: Any, how: Asking, job: JobConfig, run_id: str, *, chunk: int, here: bool = False
) -> None:
    """One stage, which writes as it goes: a run that is cancelled leaves what it has answered."""
    at_work: dict[str, Any] = {"accelerator": job.accelerator}
    if not here:
        objects = objects | "NotWritten" >> NotWritten(
            job.output, run_id, partition_by=job.partition_by, storage_options=job.storage_options, **at_work
        )
    verifiable = job.verify_sample > 0
    answered = objects | "AnswerRecordings" >> AnswerRecordings(
        decode=how.decode, ask=how.ask, verifiable=verifiable, **at_work
    )
    results = answered.results if verifiable else answered
    _ = results | "WriteRows" >> WriteRows(
        job.output,
        run_id=run_id,
        pane_every_s=_HELD_S,
        most_held=job.chunk_recordings,
        partition_by=job.partition_by,
        storage_options=job.storage_options,
        **at_work,
    )
    if verifiable:
        verify = VerifyAnswers(how.decode, how.ask, sample=job.verify_sample, **at_work)
        _ = (
            answered.asked
            | "VerifyAnswers" >> verify
            | "WriteVerified"
            >> beam.Map(
                write_verified, uri=verified_uri(job.output, run_id, chunk), storage_options=job.storage_options
            )
        )


class _CountFound(beam.PTransform):
    """Writes the number of recordings found and skipped beside the run's tables, for the process that started it.

    Recordings that the run had found, and written, before its runner restarted it count as well: they may be gone.
    """

    def __init__(self, job: JobConfig, run_id: str) -> None:
        super().__init__()
        self._uri = found_uri(job.output, run_id)
        self._read_written = ReadWritten(
            job.output, run_id, partition_by=job.partition_by, storage_options=job.storage_options
        )
        self._storage_options = job.storage_options

    def expand(self, planned: Any) -> Any:
        written = planned.found.pipeline | "WrittenId" >> self._read_written
        found = (planned.found, written) | "AllIds" >> beam.Flatten() | "DistinctIds" >> beam.Distinct()
        skipped = planned.skipped | "SkippedIds" >> beam.Keys() | "DistinctSkipped" >> beam.Distinct()
        letters = planned.kept_dead_letters | "DistinctDeadLetters" >> beam.Distinct()
        kinds = (
            found | "Found" >> beam.Map(lambda _: "found").with_output_types(str),
            skipped | "Skipped" >> beam.Map(lambda _: "skipped").with_output_types(str),
            letters | "KeptDeadLetters" >> beam.Map(lambda _: "kept_dead_letters").with_output_types(str),
        )
        return (
            kinds
            | "AllKinds" >> beam.Flatten()
            | "CountKinds" >> beam.combiners.Count.PerElement()
            | "Counts" >> beam.combiners.ToDict()
            | "WriteFound" >> beam.Map(write_found, uri=self._uri, storage_options=self._storage_options)
        )
