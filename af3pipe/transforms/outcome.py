"""Good elements and dead letters, side by side. The only place where an exception becomes a dead letter."""

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
"""These say that the worker or its account is unfit, not the recording: the runner has to see them."""


_UNEXPECTED = {
    Stage.LIST: Reason.UNREADABLE,
    Stage.READ: Reason.UNREADABLE,
    Stage.GENERATE: Reason.ENGINE_ERROR,
    Stage.PARSE: Reason.OUTPUT_INVALID,
}


class Outcome(NamedTuple):
    """What a transform gives: what went well, and all dead letters so far.

    It can be piped on as it is: the next transform takes `good` and adds its own dead letters to those that came
    before, so that nothing is lost on the way.
    """

    good: Any
    dead_letters: Any


def split_input(inputs: Any) -> tuple[Any, tuple[Any, ...]]:
    """A transform's input, whether a PCollection or an Outcome: the elements, and the dead letters before it."""
    if isinstance(inputs, Outcome):
        return inputs.good, (inputs.dead_letters,)
    return inputs, ()


def join_dead_letters(own: Any, before: tuple[Any, ...]) -> Any:
    """This step's dead letters and those of the steps before it, as one PCollection."""
    return (own, *before) | "AllDeadLetters" >> beam.Flatten() if before else own


def outcomes(
    items: Iterator[T], to_dead_letter: Callable[[Exception], DeadLetter], catch: type[Exception] = Exception
) -> Generator[T | DeadLetter, None, None]:
    """The items; where producing one raises, a dead letter in its place, and the end.

    Args:
        items: All of one recording: what follows an exception is lost with it.
        to_dead_letter: Makes the row.
        catch: What may become one; anything else is raised as it is.

    Raises:
        ModelError, EngineFailed, GuardError, StorageError: As they are: no recording is to blame.
    """
    try:
        yield from items
    except FATAL:
        raise
    except catch as error:  # a recording may fail in any way; none may end the job
        yield to_dead_letter(error)


def now_us() -> int:
    """Microseconds since 1970-01-01 UTC."""
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
    """The row for a recording, or a request of it, that raised.

    Args:
        error: `Rejected` names its own stage and reason; anything else is unexpected and brings its traceback.
        recording: What could not be answered.
        stage: Where an unexpected error happened.
        segment: The part of the recording, where it got so far.
        tasks: What was asked of it, where it got so far.
        attempts: How often it was tried.
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
    """The recording's URI as rows may have it: a signed URL without its signature."""
    return redact(recording.uri) if "?" in recording.uri or "@" in recording.uri else recording.uri


def _input_json(recording: Recording, segment: Segment | None, tasks: tuple[Task, ...]) -> str:
    """All that it takes to try again, readable without this package; secrets are masked."""
    found: dict[str, Any] = {"recording": plain(recording)}
    del found["recording"]["work_key"], found["recording"]["existing"]  # they follow from the run, not from the input
    if segment is not None:
        found["segment"] = {"index": segment.segment_index, "start_s": segment.start_s, "end_s": segment.end_s}
    if tasks:
        found["tasks"] = [plain(task) for task in tasks]
    masked = _redacted(found)
    masked["recording"]["metadata"] = recording.metadata  # as it is: JSON text, redacted before
    return json.dumps(masked, ensure_ascii=False)


def _redact_metadata(metadata: str) -> str:
    if metadata == NO_METADATA:
        return metadata
    columns = json.loads(metadata)
    masked = _redacted(columns)
    return metadata if masked == columns else to_metadata(masked)


def _redacted(value: Any, name: str = "") -> Any:
    """Redacts each text in a JSON-like value: on its JSON text, a mask could take quotes and brackets along."""
    if isinstance(value, dict):
        return {redact(key): _redacted(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item, name) for item in value]
    if value is None or isinstance(value, bool):
        return value
    begin = f"{name}="  # by some names the value is a secret
    shown = f"{begin}{value}"
    masked = redact(shown)
    return value if masked == shown else masked.removeprefix(begin)


def recording_of(input_json: str) -> Recording:
    """The recording that a dead letter is about, from its `input`."""
    columns = json.loads(input_json)["recording"]
    if isinstance(columns.get("metadata"), list):  # of format 1: pairs
        columns["metadata"] = to_metadata(dict(columns["metadata"]))
    found: Recording = _typed(Recording, columns)
    return found


def _typed(hint: Any, value: Any) -> Any:
    """What `plain` made JSON of."""
    if isinstance(value, dict) and hasattr(hint, "_fields"):
        hints = get_type_hints(hint)
        return hint(**{name: _typed(hints[name], field) for name, field in value.items() if name in hints})
    if isinstance(value, list) and get_origin(hint) is tuple:
        inner = get_args(hint)
        hints_of = itertools.repeat(inner[0]) if inner[-1] is ... else inner
        return tuple(_typed(one, item) for one, item in zip(hints_of, value, strict=False))
    return value


def plain(value: Any) -> Any:
    """A row as JSON takes it."""
    if hasattr(value, "_asdict"):
        return {name: plain(field) for name, field in value._asdict().items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value
