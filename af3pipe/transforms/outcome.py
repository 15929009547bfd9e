"""Turns exceptions into dead letters, and passes good elements and dead letters from transform to transform."""

import itertools
import json
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import apache_beam as beam

from af3pipe.audio.decoder_process import GuardError
from af3pipe.models.engine import EngineFailed, ModelError
from af3pipe.schemas import (
    NO_METADATA,
    DeadLetter,
    Reason,
    Recording,
    Rejected,
    Segment,
    Stage,
    Task,
    dead_letter_key,
    to_metadata,
)
from af3pipe.storage import StorageError, redact

T = TypeVar("T")
DEAD_LETTERS = "dead_letters"
"""Tag of the output that carries dead letters, in every transform here."""

FATAL = (ModelError, EngineFailed, GuardError, StorageError)
"""Errors of the worker or its account, not of a recording: they are raised to the runner."""


_UNEXPECTED = {
    Stage.LIST: Reason.UNREADABLE,
    Stage.READ: Reason.UNREADABLE,
    Stage.GENERATE: Reason.ENGINE_ERROR,
    Stage.PARSE: Reason.OUTPUT_INVALID,
}


class Outcome(NamedTuple):
    """Has the output of a transform: the good elements, and all dead letters so far.

    Pipe it to the next transform, which takes `good` and adds its own dead letters to the earlier ones, so that none
    is lost.
    """

    good: Any
    dead_letters: Any


def split_input(inputs: Any) -> tuple[Any, tuple[Any, ...]]:
    """Splits a transform's input (a PCollection or an Outcome) into its elements and the earlier dead letters."""
    if isinstance(inputs, Outcome):
        return inputs.good, (inputs.dead_letters,)
    return inputs, ()


def join_dead_letters(own: Any, before: tuple[Any, ...]) -> Any:
    """Flattens the dead letters of this step and of earlier steps into one PCollection."""
    return (own, *before) | "AllDeadLetters" >> beam.Flatten() if before else own


def outcomes(
    items: Iterator[T], to_dead_letter: Callable[[Exception], DeadLetter], catch: type[Exception] = Exception
) -> Generator[T | DeadLetter, None, None]:
    """Yields the items; if the iterator raises, yields a dead letter and ends.

    Args:
        items: Items of one recording; after an exception there are no more.
        to_dead_letter: Converts the exception to a dead letter.
        catch: Exceptions to convert; others are raised.

    Raises:
        ModelError, EngineFailed, GuardError, StorageError: The worker failed, not the recording.
    """
    try:
        yield from items
    except FATAL:
        raise
    except catch as error:  # a recording may fail in any way; none may end the job
        yield to_dead_letter(error)


def now_us() -> int:
    """Returns the current time in microseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1000


def to_dead_letter(
    error: Exception,
    recording: Recording,
    *,
    stage: Stage,
    segment: Segment | None = None,
    tasks: tuple[Task, ...] = (),
    attempts: int = 1,
) -> DeadLetter:
    """Makes the dead letter of a recording, or of a request about it, that failed.

    Args:
        error: `Rejected` has its own stage and reason; any other error is unexpected and recorded with its traceback.
        recording: The recording that failed.
        stage: Stage of an unexpected error.
        segment: The segment that failed, if the recording was decoded.
        tasks: The tasks of the failed request, if there was one.
        attempts: Number of attempts.
    """
    if isinstance(error, Rejected):
        stage, reason, detail, trace = error.stage, error.reason, error.detail, None
        decoder, position_s = error.decoder, error.position_s
    else:
        reason = _UNEXPECTED.get(stage, Reason.DECODE_ERROR)
        detail = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        decoder = position_s = None
    if segment is not None:
        decoder = decoder or segment.info.decoder
        position_s = segment.start_s if position_s is None else position_s
    recording = recording._replace(metadata=_redact_metadata(recording.metadata))
    input_json = _input_json(recording, segment, tasks)
    key = dead_letter_key(recording.recording_id, stage, reason, input_json)
    return DeadLetter(
        recording_id=recording.recording_id,
        uri=public_uri(recording),
        stage=stage,
        reason=reason,
        detail=redact(detail),
        retryable=reason.retryable,
        size_bytes=recording.size_bytes,
        decoder=decoder,
        position_s=position_s,
        attempts=attempts,
        traceback=None if trace is None else redact(trace),
        input=input_json,
        dead_letter_key=key,
        run_id=dict(recording.existing.dead_letters).get(key, ""),
        created_at=now_us(),
        metadata=recording.metadata,
    )


def public_uri(recording: Recording) -> str:
    """Returns the recording's URI for output rows: a signed URL is returned without its signature."""
    return redact(recording.uri) if "?" in recording.uri or "@" in recording.uri else recording.uri


def _input_json(recording: Recording, segment: Segment | None, tasks: tuple[Task, ...]) -> str:
    """Returns all that a retry needs as JSON text, with secrets masked."""
    found: dict[str, Any] = {"recording": plain(recording)}
    del found["recording"]["work_key"], found["recording"]["existing"]  # they follow from the run, not from the input
    if segment is not None:
        found["segment"] = {"index": segment.segment_index, "start_s": segment.start_s, "end_s": segment.end_s}
    if tasks:
        found["tasks"] = [plain(task) for task in tasks]
    masked = _redacted(found)
    masked["recording"]["metadata"] = recording.metadata  # verbatim: JSON text that was redacted before
    return json.dumps(masked, ensure_ascii=False)


def _redact_metadata(metadata: str) -> str:
    if metadata == NO_METADATA:
        return metadata
    columns = json.loads(metadata)
    masked = _redacted(columns)
    return metadata if masked == columns else to_metadata(masked)


def _redacted(value: Any, name: str = "") -> Any:
    """Redacts each text in a JSON-like value; on JSON text, a mask could replace quotes and brackets, too."""
    if isinstance(value, dict):
        return {redact(key): _redacted(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item, name) for item in value]
    if value is None or isinstance(value, bool):
        return value
    begin = f"{name}="  # some names say that the value is a secret
    shown = f"{begin}{value}"
    masked = redact(shown)
    return value if masked == shown else masked.removeprefix(begin)


def recording_of(input_json: str) -> Recording:
    """Parses a dead letter's `input` and returns its recording."""
    columns = json.loads(input_json)["recording"]
    if isinstance(columns.get("metadata"), list):  # of format 1: pairs
        columns["metadata"] = to_metadata(dict(columns["metadata"]))
    found: Recording = _typed(Recording, columns)
    return found


def _typed(hint: Any, value: Any) -> Any:
    """Restores a value of this type from the result of `plain`."""
    if isinstance(value, dict) and hasattr(hint, "_fields"):
        hints = get_type_hints(hint)
        return hint(**{name: _typed(hints[name], field) for name, field in value.items() if name in hints})
    if isinstance(value, list) and get_origin(hint) is tuple:
        inner = get_args(hint)
        hints_of = itertools.repeat(inner[0]) if inner[-1] is ... else inner
        return tuple(_typed(one, item) for one, item in zip(hints_of, value, strict=False))
    return value


def plain(value: Any) -> Any:
    """Converts a row to dicts and lists, for JSON."""
    if hasattr(value, "_asdict"):
        return {name: plain(field) for name, field in value._asdict().items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value
