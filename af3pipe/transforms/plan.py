"""Plans the work: groups recordings by object and skips what earlier runs into the same output have done."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.coders import registry

from af3pipe import storage
from af3pipe.schemas import AudioObject, DeadLetter, Recording, RecordingResult, Rejected, Stage, work_key
from af3pipe.storage import ObjectInfo
from af3pipe.tables.existing import (
    ExistingAnswer,
    ExistingLetter,
    ExistingRecording,
    ExistingRows,
    Place,
    copy_of,
    read_answers,
)
from af3pipe.transforms import metrics
from af3pipe.transforms.ask import Asker
from af3pipe.transforms.coders import RowTupleCoder
from af3pipe.transforms.decode import Decoder
from af3pipe.transforms.inputs.identity import check_id, name_recordings
from af3pipe.transforms.outcome import DEAD_LETTERS, public_uri, recording_of, to_dead_letter
from af3pipe.transforms.overlap import OverlapDoFn
from af3pipe.transforms.result import repeated_result
from af3pipe.transforms.stores import count_retries, set_storage

STAT_THREADS = 32
FOUND = "found"
SKIPPED = "skipped"
KEPT_LETTERS = "kept_dead_letters"

for _row_class in (ExistingRecording, ExistingAnswer, ExistingLetter, Place):
    registry.register_coder(_row_class, RowTupleCoder)


class WorkKeys:
    """Computes `work_key`s, which identify all that is requested of a recording.

    Args:
        decoder: Has the settings that decide how a recording ends.
        asker: Has the tasks and the model; must be set up.
    """

    def __init__(self, decoder: Decoder, asker: Asker) -> None:
        self._policy = decoder.policy
        self._asker = asker

    def add(self, recording: Recording, letters: Iterable[DeadLetter] = ()) -> Recording:
        """Returns the recording with its `work_key`; `letters` are dead letters of further manifest rows about it."""
        tasks = self._asker.tasks_of(recording)
        policy = *self._policy, *sorted(letter.dead_letter_key for letter in letters)
        return recording._replace(work_key=work_key(recording, tasks, *self._asker.model, policy))


class Planned(NamedTuple):
    """Says what to do about an object.

    Attributes:
        work: The object to process; None if all its recordings are done.
        found: recording_id of each of its recordings.
        skipped: (recording_id, content identity) of each recording that an earlier run has done.
        kept_dead_letters: Keys of the dead letters of the skipped recordings.
    """

    work: AudioObject | None
    found: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    kept_dead_letters: tuple[str, ...]


def stat_object(mentions: Sequence[Recording]) -> ObjectInfo | Rejected:
    """Returns size, etag and modification time of an object: from a mention that has them, else from the store."""
    for found in mentions:
        if found.size_bytes is not None or found.etag:
            return ObjectInfo(found.uri, found.size_bytes, found.etag, found.mtime)
    try:
        return storage.stat(mentions[0].uri)
    except Rejected as rejected:
        return rejected


def plan_object(
    uri: str,
    mentions: Sequence[Recording],
    letters: Iterable[DeadLetter],
    stated: ObjectInfo | Rejected | None,
    existing: ExistingRows,
    keys: WorkKeys | None = None,
    *,
    retry: bool = False,
) -> Planned:
    """Decides what there is to do about an object.

    Args:
        uri: URI of the object.
        mentions: Recordings of the object as inputs list them; their ids were checked.
        letters: Dead letters of rejected recordings, and of rejected further rows about the others.
        stated: Result of `stat_object`; None without mentions.
        existing: Rows that earlier runs wrote about the object.
        keys: Computes `work_key`s; None skips nothing.
        retry: Whether a recording with dead letters always counts as not done.
    """
    by_id: dict[str, dict[str, DeadLetter]] = defaultdict(dict)
    recordings: list[Recording] = []
    for item in [*letters, *name_recordings(mentions, existing.recordings)]:
        if isinstance(item, DeadLetter):
            by_id[item.recording_id][item.dead_letter_key] = item
        elif isinstance(stated, Rejected):
            letter = to_dead_letter(stated, item, stage=Stage.READ)
            by_id[letter.recording_id][letter.dead_letter_key] = letter
        elif stated is not None:
            recordings.append(item._replace(size_bytes=stated.size_bytes, etag=stated.etag, mtime=stated.mtime))
    found = tuple(dict.fromkeys([*(recording.recording_id for recording in recordings), *by_id]))
    skipped: list[tuple[str, str]] = []
    wanted: list[Recording] = []
    copied: list[tuple[Recording, ExistingAnswer]] = []
    ready: list[RecordingResult] = []
    kept_letters: list[str] = []
    for recording in recordings:
        own = existing.with_first_run(by_id.pop(recording.recording_id, {}).values())
        if keys is not None:
            recording = keys.add(recording, own)
            if (done := existing.done(recording, retry=retry)) is not None:
                if existing.is_latest(done):
                    skipped.append((recording.recording_id, recording.content_identity))
                    kept_letters += done.dead_letter_keys
                else:
                    ready.append(repeated_result(recording, done))
                continue
            recording, answers = existing.of(recording)
            copied += ((recording, answer) for answer in answers)
        wanted.append(recording)
        if own:
            by_id[recording.recording_id] = {letter.dead_letter_key: letter for letter in own}
    kept_ids = {recording.recording_id for recording in wanted}
    for recording_id in list(by_id):
        if recording_id in kept_ids:
            continue
        own = existing.with_first_run(by_id[recording_id].values())
        if keys is not None and existing.is_rejected(own, retry=retry):
            skipped.append((recording_id, recording_of(own[0].input).content_identity))
            kept_letters += (letter.dead_letter_key for letter in own)
            del by_id[recording_id]
        else:
            by_id[recording_id] = {letter.dead_letter_key: letter for letter in own}
    rejected = tuple(letter for own in by_id.values() for letter in own.values())
    whole = read_answers(answer for _, answer in copied)
    copies = (
        copy_of(whole[answer.recording_id, answer.covered.answer_key], recording, public_uri(recording))
        for recording, answer in copied
    )
    work = AudioObject(uri, tuple(wanted), rejected, tuple(copies), tuple(ready))
    return Planned(work if wanted or rejected or ready else None, found, tuple(skipped), tuple(kept_letters))


class PlanDoFn(OverlapDoFn[tuple[str, dict[str, Iterable[Any]]], "ObjectInfo | Rejected | None"]):
    """Emits the `AudioObject`s to process, and to tags the ids found, the recordings skipped, and their dead letters.

    The input is (uri, {`mentions`, `letters`, `existing`}); the last two may be missing. Up to 32 threads request the
    metadata of objects from the store concurrently.

    Args:
        decoder: Has the decoding settings. Nothing is skipped without it and `asker`.
        asker: Has the tasks and the model.
        storage_options: See `ReadRecordings`.
    """

    def __init__(self, decoder: Decoder | None, asker: Asker | None, storage_options: storage.StorageOptions) -> None:
        super().__init__(max_pending=2 * STAT_THREADS)
        self._decoder = decoder
        self._asker = asker
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)
        self._keys = None
        if self._decoder is not None and self._asker is not None:
            with self.naming_worker():
                self._asker.setup()
            self._keys = WorkKeys(self._decoder, self._asker)
        self._pool = ThreadPoolExecutor(STAT_THREADS, thread_name_prefix="af3pipe-stat")

    def teardown(self) -> None:
        super().teardown()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, group: tuple[str, dict[str, Iterable[Any]]]) -> "Future[ObjectInfo | Rejected | None]":
        mentions = group[1]["mentions"] = list(group[1].get("mentions", ()))
        return self._pool.submit(stat_object, mentions) if mentions else self._pool.submit(_nothing)

    def emit(
        self, group: tuple[str, dict[str, Iterable[Any]]], future: "Future[ObjectInfo | Rejected | None]"
    ) -> Iterator[Any]:
        uri, found = group
        mentions, letters = list(found["mentions"]), list(found.get("letters", ()))
        if not mentions and not letters:
            return  # only earlier runs have rows about it
        existing = ExistingRows(found.get("existing", ()))
        planned = plan_object(uri, mentions, letters, future.result(), existing, self._keys)
        metrics.count("recordings_found", len(planned.found))
        metrics.count("recordings_skipped_done", len(planned.skipped))
        metrics.count("recordings_done", len(planned.skipped))
        yield from (beam.pvalue.TaggedOutput(FOUND, one) for one in planned.found)
        yield from (beam.pvalue.TaggedOutput(SKIPPED, one) for one in planned.skipped)
        yield from (beam.pvalue.TaggedOutput(KEPT_LETTERS, one) for one in planned.kept_dead_letters)
        if planned.work is not None:
            yield planned.work

    def finish_bundle(self) -> Iterator[Any]:
        yield from super().finish_bundle()
        count_retries()


def _nothing() -> None:
    return None


class _CheckIdDoFn(beam.DoFn):
    """Checks an id: maps (id, {`mentions`, `existing`}) to (uri, `Recording`), and `DeadLetter` to its tag."""

    def process(self, group: tuple[str, dict[str, Iterable[Any]]]) -> Iterator[Any]:
        mentions = list(group[1]["mentions"])
        for item in check_id(mentions, group[1].get("existing", ())) if mentions else ():
            if isinstance(item, DeadLetter):
                yield beam.pvalue.TaggedOutput(DEAD_LETTERS, item)
            else:
                yield public_uri(item), item


class PlannedObjects(NamedTuple):
    """Has the outputs of `PlanObjects`: objects to process, ids found, recordings skipped, and their dead letters."""

    objects: Any
    found: Any
    skipped: Any
    kept_dead_letters: Any


class PlanObjects(beam.PTransform):
    """Deduplicates listed recordings, groups them by object, and skips what earlier runs have done.

    The input is a bounded `Outcome` of `Recording`; the output is `PlannedObjects`.

    Args:
        existing: PCollection of the output's `ExistingRecording`, `ExistingAnswer` and `ExistingLetter`; None for a
            run that does not resume.
        decoder: Has the decoding settings. Nothing is skipped without it and `asker`.
        asker: Has the tasks and the model.
        storage_options: See `ReadRecordings`.
    """

    def __init__(
        self,
        *,
        existing: Any = None,
        decoder: Decoder | None = None,
        asker: Asker | None = None,
        storage_options: storage.StorageOptions,
    ) -> None:
        super().__init__()
        self._existing = existing
        self._dofn = PlanDoFn(decoder, asker, storage_options)

    def expand(self, listed: Any) -> Any:
        by_id: dict[str, Any] = {
            "mentions": listed.good
            | "ById" >> beam.Map(lambda found: (found.recording_id, found)).with_output_types(tuple[str, Recording])
        }
        by_uri: dict[str, Any] = {}
        if self._existing is not None:
            by_id["existing"] = (
                self._existing
                | "ExistingRecordings" >> beam.Filter(lambda row: isinstance(row, ExistingRecording))
                | "ExistingById" >> beam.Map(lambda row: (row.recording_id, row)).with_output_types(tuple[str, Any])
            )
            by_uri["existing"] = self._existing | "ExistingByUri" >> beam.Map(
                lambda row: (row.uri, row)
            ).with_output_types(tuple[str, Any])
        checked = (
            by_id
            | "SameId" >> beam.CoGroupByKey()
            | "CheckId"
            >> beam.ParDo(_CheckIdDoFn())
            .with_output_types(tuple[str, Recording], **{DEAD_LETTERS: DeadLetter})
            .with_outputs(DEAD_LETTERS, main="recordings")
        )
        letters = (listed.dead_letters, checked[DEAD_LETTERS]) | "AllRejected" >> beam.Flatten()
        by_uri["mentions"] = checked.recordings
        by_uri["letters"] = letters | "LettersByUri" >> beam.Map(
            lambda letter: (letter.uri, letter)
        ).with_output_types(tuple[str, DeadLetter])
        plan = beam.ParDo(self._dofn).with_output_types(
            AudioObject, **{FOUND: str, SKIPPED: tuple[str, str], KEPT_LETTERS: str}
        )
        planned = (
            by_uri
            | "SameObject" >> beam.CoGroupByKey()
            | "Plan" >> plan.with_outputs(FOUND, SKIPPED, KEPT_LETTERS, main="objects")
        )
        return PlannedObjects(planned.objects, planned[FOUND], planned[SKIPPED], planned[KEPT_LETTERS])
