"""Assigns ids to recordings: rows about the same audio become one recording, or one for each distinct metadata."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from af3pipe.schemas import (
    NO_METADATA,
    DeadLetter,
    Question,
    Reason,
    Recording,
    Rejected,
    Stage,
)
from af3pipe.tables.existing import ExistingRecording, is_other_source, is_same_metadata
from af3pipe.transforms.outcome import to_dead_letter


def has_own_id(recording: Recording) -> bool:
    """Returns whether the recording's id is from a manifest or a message."""
    return recording.recording_id != recording.source_key


def check_id(
    mentions: Iterable[Recording], existing: Iterable[ExistingRecording] = ()
) -> Iterator[Recording | DeadLetter]:
    """Checks an id from manifests: yields the mentions of one recording, and dead letters for all other mentions.

    An id identifies one audio with one metadata, in all runs. A dead letter for a clash has another id and describes
    both recordings.

    Args:
        mentions: All mentions with this id; those whose `source_key` it is keep it.
        existing: Rows of earlier runs with this id.
    """
    mentions = sorted(mentions, key=lambda found: (found.uri, found.size_bytes is None, repr(found)))
    unnamed = [found for found in mentions if not has_own_id(found)]
    if unnamed:  # by chance, or copied from an output, the id is that of audio without an id of its own
        yield from unnamed
        for found in filter(has_own_id, mentions):
            yield _clash(found, f"it is the source_key of {unnamed[0].uri}{_span(unnamed[0])}")
        return
    earlier = max(existing, key=lambda row: row.created_at, default=None)
    if earlier is not None and all(is_other_source(earlier, found) for found in mentions):
        where = f"{earlier.uri} from {earlier.offset_s:g} s on" if earlier.offset_s else earlier.uri
        for found in mentions:
            yield _clash(found, f"an earlier run into this output gave it to {where}")
        return
    if earlier is not None:
        # The recording that already has the id keeps it.
        mentions.sort(
            key=lambda found: (
                is_other_source(earlier, found),
                not is_same_metadata(earlier, found.metadata),
            )
        )
    first = mentions[0]
    for found in mentions:
        if found.source_key != first.source_key:
            yield _clash(found, f"it also names {first.uri}{_span(first)}")
        elif found.metadata != first.metadata:
            yield _clash(found, f"another row with it has other columns: {first.metadata}, and here {found.metadata}")
        else:
            yield found


def _span(recording: Recording) -> str:
    if not recording.offset_s and recording.duration_s is None:
        return ""
    until = "its end" if recording.duration_s is None else f"{recording.offset_s + recording.duration_s:g} s"
    return f" from {recording.offset_s:g} s to {until}"


def _clash(recording: Recording, why: str) -> DeadLetter:
    detail = f"id {recording.recording_id!r} cannot be that of {recording.uri}{_span(recording)}: {why}"
    # This id differs from that of the other recording, and from that of this audio without an id.
    parts = recording.recording_id, recording.source_key, recording.metadata
    renamed = recording._replace(recording_id=_hash("clash", *parts))
    error = Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"{detail}; ids must be unique")
    return to_dead_letter(error, renamed, stage=Stage.LIST)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode(errors="surrogateescape")).hexdigest()[:20]


def name_recordings(
    mentions: Sequence[Recording], existing: Sequence[ExistingRecording] = ()
) -> Iterator[Recording | DeadLetter]:
    """Deduplicates all mentions of one object into recordings with ids.

    Rows with the same audio, id and metadata are one recording with all their questions. Rows without an id that
    differ in metadata are separate recordings, with ids derived from audio and metadata; a mention without id,
    metadata and questions (a listed file) then adds no further recording.

    Args:
        mentions: Mentions of one object; ids from manifests were checked by `check_id`.
        existing: Rows of earlier runs about the object; recordings keep the ids they have there.
    """
    existing_by_source: dict[str, list[ExistingRecording]] = defaultdict(list)
    for row in existing:
        existing_by_source[row.source_key or row.recording_id].append(row)
    by_source: dict[str, list[Recording]] = defaultdict(list)
    for found in mentions:
        by_source[found.source_key].append(found)
    for source, found_there in by_source.items():
        groups: dict[tuple[str, str], list[Recording]] = defaultdict(list)
        for found in found_there:
            groups[found.recording_id, found.metadata].append(found)
        unnamed = [metadata for recording_id, metadata in groups if recording_id == source]
        bare = groups.get((source, NO_METADATA))
        if bare and len(unnamed) > 1 and not any(found.questions for found in bare):
            del groups[source, NO_METADATA]
            unnamed.remove(NO_METADATA)
        ids = _ids_for(source, unnamed, existing_by_source[source])
        for (recording_id, metadata), group in groups.items():
            own_id = ids[metadata] if recording_id == source else recording_id
            yield from _merged([found._replace(recording_id=own_id) for found in group])


def _ids_for(source: str, unnamed: Sequence[str], existing: Sequence[ExistingRecording]) -> dict[str, str]:
    """Returns ids, by metadata, of recordings without an id: the same ids in every run, independent of the others.

    One recording has the `source_key` as id: the one that has it from an earlier run, else the only one, if there is
    only one.
    """
    with_metadata = {metadata: _hash(source, metadata) for metadata in unnamed}
    newest: dict[str, ExistingRecording] = {}
    for row in existing:
        known = newest.setdefault(row.recording_id, row)
        newest[row.recording_id] = max(known, row, key=lambda found: found.created_at)
    unknown = [metadata for metadata in unnamed if with_metadata[metadata] not in newest]
    holders = unknown if len(unnamed) == 1 else []
    if source in newest:
        there = newest[source]
        # Text of format 1 may match two (a number or a text): prefer the text.
        same = sorted((one for one in unknown if is_same_metadata(there, one)), key=lambda one: one != there.metadata)
        holders = same[:1] or holders
    return with_metadata | dict.fromkeys(holders, source)


def _merged(mentions: Sequence[Recording]) -> Iterator[Recording | DeadLetter]:
    """Merges mentions into one recording with all questions; a mention whose question id clashes is a dead letter."""
    requested: dict[str, Question] = {}
    for found in mentions:
        clash = next((q for q in found.questions if q.question_id and requested.get(q.question_id, q) != q), None)
        if clash is not None:
            detail = f"question id {clash.question_id!r} is also that of another question about this recording"
            error = Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, f"{detail}; ids must differ")
            yield to_dead_letter(error, found, stage=Stage.LIST)
            continue
        requested |= {question.question_id or repr(question): question for question in found.questions}
    first = min(mentions, key=lambda found: (found.size_bytes is None, repr(found)))
    yield first._replace(questions=tuple(requested.values()))
