"""The graph of a job: recordings in, Parquet out. Needs neither torch nor the model's weights."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindows

from af3pipe.audio.guarded import DecoderLimits
from af3pipe.models.tasks import DEFAULT_QUESTION_TOKENS
from af3pipe.pipelines.handover import found_uri, verified_uri, write_found, write_verified
from af3pipe.pipelines.job import JobConfig
from af3pipe.pipelines.run_record import ended_uri, stop_uri
from af3pipe.schemas import DeadLetter, Recording, RecordingResult
from af3pipe.transforms import (
    AcknowledgeMessages,
    AnswerAndSettle,
    AskAudioFlamingo,
    DecodeAudio,
    JoinRejected,
    Notified,
    NotWritten,
    Outcome,
    PlannedRecording,
    ReadNotifications,
    ReadRecordings,
    ReadWritten,
    ResumeRecordings,
    SettledRecording,
    SettleRejected,
    VerifyAnswers,
    WatchRecordings,
    WriteSettledRecordings,
)
from af3pipe.transforms.ended import TellEnd
from af3pipe.transforms.inputs.dedup import Once
from af3pipe.transforms.inputs.notifications import version_of
from af3pipe.transforms.inputs.pubsub import is_subscription, subscription_of
from af3pipe.transforms.inputs.read import list_recordings
from af3pipe.transforms.launcher import CheckWorkers
from af3pipe.transforms.write import ROWS_PER_SHARD

_HELD_S = 600.0
"""So long a worker of a batch holds what it has settled at most: what is lost with it."""
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
        verifiable=job.verify_sample > 0,
        keep_engine=keep_engine,
    )
    return Asking(decode, ask)


def found_by(job: JobConfig, name: str) -> Iterator[Recording | DeadLetter]:
    """What the job finds under a name."""
    return list_recordings(name, channel=job.channel, stream=job.stream, allow_prefixes=job.allow_prefixes)


def build(pipeline: beam.Pipeline, job: JobConfig, run_id: str) -> None:
    """Lays the whole job, from listing on, for workers elsewhere."""
    how = asking(job, keep_engine=True)
    inputs = pipeline | "CheckWorkers" >> CheckWorkers(job.inputs)
    found = inputs | "ReadRecordings" >> ReadRecordings(
        channel=job.channel,
        stream=job.stream,
        allow_prefixes=job.allow_prefixes,
        storage_options=job.storage_options,
    )
    _ = found | "CountFound" >> _CountFound(job, run_id)
    resume = ResumeRecordings(
        job.output if job.resume else None, how.decode, how.ask, run_id=run_id, storage_options=job.storage_options
    )
    left = found | "ResumeRecordings" >> resume
    joined = Outcome(left.good, left.dead_letters) | "JoinRejected" >> JoinRejected()
    skipped = left.skipped | "SettleSkipped" >> beam.Map(_settled).with_output_types(SettledRecording)
    not_asked = (joined.settled, skipped) | "NotAsked" >> beam.Flatten()
    to_write = not_asked | "NotAskedNotWritten" >> NotWritten(job.output, run_id, storage_options=job.storage_options)
    written = _written(job, run_id) | {"most_held": ROWS_PER_SHARD}
    _ = to_write | "WriteNotAsked" >> WriteSettledRecordings(job.output, **written)
    _ask_and_write(joined.planned, how, job, run_id, chunk=0)


def build_chunk(
    pipeline: beam.Pipeline,
    job: JobConfig,
    run_id: str,
    planned: Sequence[PlannedRecording],
    number: int,
    *,
    here: bool,
) -> None:
    """Lays the job for recordings that are planned.

    Args:
        pipeline: Where to.
        job: What to do; its `verify_sample` is this chunk's.
        run_id: Names the run.
        planned: What there is to ask.
        number: Of the chunk.
        here: Whether it runs in this process; else its recordings are spread over workers.
    """
    create = beam.Create(planned, reshuffle=not here).with_output_types(PlannedRecording)
    _ask_and_write(
        pipeline | "Planned" >> create, asking(job, keep_engine=not here), job, run_id, chunk=number, here=here
    )


def build_stream(pipeline: beam.Pipeline, job: JobConfig, run_id: str, *, tell_end: bool = False) -> None:
    """Lays the job as a stream that ends when it is stopped: folders are watched, subscriptions are read.

    Args:
        pipeline: Where to.
        job: What to do.
        run_id: Names the run.
        tell_end: Whether the last step leaves word when all is written.
    """
    how = asking(job, keep_engine=True)
    _ = pipeline | "CheckWorkers" >> CheckWorkers(job.inputs)
    found, waiting = _found_in_stream(pipeline, job, run_id)
    resume = ResumeRecordings(
        job.output if job.resume else None, how.decode, how.ask, storage_options=job.storage_options
    )
    left = found | "ResumeRecordings" >> resume
    settled = (
        left.good
        | "SpreadRecordings" >> beam.Reshuffle()
        | "AnswerAndSettle" >> AnswerAndSettle(how.decode, how.ask, job.all_tasks(), accelerator=job.accelerator)
    )
    told = left.dead_letters | "NotYetTold" >> beam.Filter(lambda letter: not letter.run_id)
    rejected = told | "SettleRejected" >> SettleRejected()
    written = (
        (settled, rejected)
        | "AllSettled" >> beam.Flatten()
        | "WriteSettledRecordings"
        >> WriteSettledRecordings(
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
        told_before = left.dead_letters | "ToldBefore" >> beam.Filter(lambda letter: letter.run_id)
        durable = (
            written | "WrittenEver" >> beam.WindowInto(GlobalWindows()),  # as the others' windows
            left.skipped | "Skipped" >> beam.Map(version_of).with_output_types(tuple[str, str]),
            told_before | "RejectedBefore" >> beam.Map(version_of).with_output_types(tuple[str, str]),
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
        watch = WatchRecordings(folders, every_s=job.watch.every, **how)
        found.append(pipeline | "WatchRecordings" >> watch)
    waiting = [one.waiting for one in notified] | "AllWaiting" >> beam.Flatten() if notified else None
    if len(found) == 1:
        return found[0], waiting
    good = [one.good for one in found] | "AllFound" >> beam.Flatten()
    letters = [one.dead_letters for one in found] | "AllRejected" >> beam.Flatten()
    return Outcome(good, letters) | "Once" >> Once(), waiting  # several may tell of the same


def _ask_and_write(planned: Any, how: Asking, job: JobConfig, run_id: str, *, chunk: int, here: bool = False) -> None:
    """One stage, which writes as it goes: a run that is given up leaves what it has answered."""
    at_work: dict[str, Any] = {"accelerator": job.accelerator}
    if not here:
        planned = planned | "NotWritten" >> NotWritten(
            job.output, run_id, storage_options=job.storage_options, **at_work
        )
    answered = planned | "AnswerAndSettle" >> AnswerAndSettle(how.decode, how.ask, job.all_tasks(), **at_work)
    settled = answered.settled if job.verify_sample else answered
    _ = settled | "WriteSettledRecordings" >> WriteSettledRecordings(job.output, **_written(job, run_id), **at_work)
    if job.verify_sample:
        verify = VerifyAnswers(how.decode, how.ask, sample=job.verify_sample, **at_work)
        _ = (
            answered
            | "VerifyAnswers" >> verify
            | "WriteVerified"
            >> beam.Map(
                write_verified, uri=verified_uri(job.output, run_id, chunk), storage_options=job.storage_options
            )
        )


def _written(job: JobConfig, run_id: str) -> dict[str, Any]:
    """How a batch's rows are written."""
    return {
        "run_id": run_id,
        "pane_every_s": _HELD_S,
        "most_held": job.chunk_recordings,
        "partition_by": job.partition_by,
        "storage_options": job.storage_options,
    }


def _settled(result: RecordingResult) -> SettledRecording:
    return SettledRecording(result, (), ())


class _CountFound(beam.PTransform):
    """Leaves the number of recordings found beside the run's tables; those rejected already count too.

    And those that the run had found, and written, before its runner began it again: they may be gone by now.
    """

    def __init__(self, job: JobConfig, run_id: str) -> None:
        super().__init__()
        self._uri = found_uri(job.output, run_id)
        self._read_written = ReadWritten(job.output, run_id, storage_options=job.storage_options)
        self._storage_options = job.storage_options

    def expand(self, recordings: Any) -> Any:
        ids = [
            recordings.good | "FoundId" >> beam.Map(lambda found: found.recording_id).with_output_types(str),
            recordings.dead_letters
            | "RejectedId" >> beam.Map(lambda letter: letter.recording_id).with_output_types(str),
            recordings.good.pipeline | "WrittenId" >> self._read_written,
        ]
        return (
            ids
            | "AllIds" >> beam.Flatten()
            | "DistinctIds" >> beam.Distinct()
            | "CountIds" >> beam.combiners.Count.Globally()
            | "WriteFound" >> beam.Map(write_found, uri=self._uri, storage_options=self._storage_options)
        )
