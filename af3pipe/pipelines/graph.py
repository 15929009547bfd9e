"""Builds the Beam graph of a job, from inputs to Parquet tables, without torch and the model's weights."""

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
from af3pipe.transforms.end_signal import SignalEnd
from af3pipe.transforms.inputs.dedup import Deduplicate
from af3pipe.transforms.inputs.pubsub import is_subscription, subscription_of
from af3pipe.transforms.inputs.read import ListRecordings, list_recordings
from af3pipe.transforms.launcher import CheckWorkers
from af3pipe.transforms.plan import PlanObjects
from af3pipe.transforms.resume import PlanStream, ReadExisting
from af3pipe.transforms.write import WriteRows
from af3pipe.transforms.written import NotWritten, ReadWritten

_MAX_BUFFERED_S = 600.0
"""Longest time that a batch worker buffers results before it writes them; a lost worker loses these."""
_LEASE_S = 60
"""Lease of messages: time after which Pub/Sub delivers the messages of a killed watch again."""


class Asking(NamedTuple):
    """Has the transforms that decode a job's recordings and run the model on them."""

    decode: DecodeAudio
    ask: AskAudioFlamingo


def asking(job: JobConfig, *, keep_engine: bool = False) -> Asking:
    """Creates the transforms that decode recordings and run the model on them.

    Args:
        job: The job.
        keep_engine: See `AskAudioFlamingo`.
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
    """Lists the recordings of one input of a job."""
    return list_recordings(
        name, channel=job.channel, stream=job.stream, allow_prefixes=job.allow_prefixes, exclude=[job.output]
    )


def build(pipeline: beam.Pipeline, job: JobConfig, run_id: str) -> None:
    """Builds the whole job, including listing, for remote workers."""
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
    """Builds the job for a chunk of planned objects.

    Args:
        pipeline: The pipeline to add to.
        job: The job; its `verify_sample` is the sample size of this chunk.
        run_id: The run.
        planned: The objects of the chunk.
        number: Number of the chunk.
        here: Whether it runs in this process; else its objects are distributed to workers.
    """
    create = beam.Create(planned, reshuffle=not here).with_output_types(AudioObject)
    objects = pipeline | "Planned" >> create
    _answer_and_write(objects, asking(job, keep_engine=not here), job, run_id, chunk=number, here=here)


def build_stream(pipeline: beam.Pipeline, job: JobConfig, run_id: str, *, signal_end: bool = False) -> None:
    """Builds the job as a stream, which watches folders and reads subscriptions until it is stopped.

    Args:
        pipeline: The pipeline to add to.
        job: The job.
        run_id: The run.
        signal_end: Whether the last step signals completion when all is written.
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
            written | "WrittenEver" >> beam.WindowInto(GlobalWindows()),  # like the other PCollection
            planned.skipped,
        ) | "Durable" >> beam.Flatten()
        last = {"waiting": waiting, "durable": durable} | "AcknowledgeMessages" >> AcknowledgeMessages(
            ack_deadline_s=_LEASE_S
        )
    if signal_end:
        _ = last | "SignalEnd" >> SignalEnd(ended_uri(job.output, run_id), storage_options=job.storage_options)


def _found_in_stream(pipeline: beam.Pipeline, job: JobConfig, run_id: str) -> tuple[Outcome, Any]:
    """Reads all inputs; returns what they find and the messages to acknowledge (None without subscriptions)."""
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
    return Outcome(good, letters) | "Deduplicate" >> Deduplicate(), waiting  # inputs may overlap


def _answer_and_write(
    objects: Any, how: Asking, job: JobConfig, run_id: str, *, chunk: int, here: bool = False
) -> None:
    """Adds one stage that answers recordings and writes results as it goes: a cancelled run keeps what it wrote."""
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
        pane_every_s=_MAX_BUFFERED_S,
        max_buffered=job.chunk_recordings,
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

    Recordings that the run wrote before its runner restarted it count, too, as their inputs may no longer exist.
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
