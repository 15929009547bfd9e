"""Encodes rows that cross processes: compact, without pickling, with their class kept, readable by later versions.

A RowCoder gives back an anonymous `BeamSchema_...` class in another process, and pickling a NumPy array costs more
than its bytes. So a row is flattened to plain tuples for Beam's FastPrimitivesCoder, PCM goes as raw bytes, and
the row's class is built again from its own annotations.

State and shuffles may outlive a version of this package (a stream that is updated in place). So each encoded row
begins with the names of its fields: missing fields get their defaults and unknown ones are ignored. Format 1 had no
names.
"""

import functools
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from apache_beam import coders
from apache_beam.coders import registry

from af3pipe.schemas import (
    Answer,
    AudioInfo,
    AudioObject,
    Covered,
    DeadLetter,
    Existing,
    Levels,
    Question,
    Recording,
    RecordingResult,
    RecordingRow,
    Segment,
    Task,
    TimedText,
    to_metadata,
)

Row = TypeVar("Row")
_PCM = np.dtype("<f4")
_NAMED = "af3pipe2:"
"""Prefix of the names of a row's fields, which distinguishes a row from one of format 1."""

_FORMAT_1: dict[type, str] = {
    Recording: (
        "recording_id uri size_bytes etag mtime offset_s duration_s questions metadata channel stream work_key "
        "existing"
    ),
    DeadLetter: (
        "recording_id uri stage reason detail retryable size_bytes decoder position_s attempts traceback input "
        "dead_letter_key run_id created_at"
    ),
    Answer: (
        "recording_id uri size_bytes etag mtime segment_index start_s end_s duration_s sample_rate channels codec "
        "peak_dbfs rms_dbfs clipped_share silent channel stream task prompt history question_id question choices "
        "text choice segments finish_reason audio_tokens prompt_tokens new_tokens model_id model_revision family "
        "engine dtype decoding answer_key metadata run_id created_at"
    ),
    Existing: "answers dead_letters",
    Covered: "answer_key task pieces duration_s levels content_identity",
    Levels: "peak_dbfs rms_dbfs clipped_share silent",
    Question: "question_id text choices prompt after",
    TimedText: "start_s end_s text",
}
"""Fields of rows of format 1, in order, since these rows are encoded without names."""


class _Converter(NamedTuple):
    """Converts the values of one field to types that Beam's coder supports, and back."""

    flatten: Callable[[Any], Any]
    rebuild: Callable[[Any], Any]


def _same(value: object) -> object:
    return value


def _converter(hint: object) -> _Converter:
    """Returns the converter for a type annotation; most fields are primitives and need no conversion."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _Converter(lambda member: member.value, hint)
    if isinstance(hint, type) and hasattr(hint, "_fields"):
        return _row_converter(hint)
    if get_origin(hint) is np.ndarray:
        return _Converter(
            lambda pcm: np.ascontiguousarray(pcm, _PCM).tobytes(),
            lambda data: np.frombuffer(data, _PCM).astype(np.float32),  # a copy: torch warns on read-only memory
        )
    if get_origin(hint) is tuple and len(get_args(hint)) == 2 and get_args(hint)[1] is ...:
        inner = _converter(get_args(hint)[0])
        if inner.flatten is not _same:
            return _Converter(
                lambda items: tuple(inner.flatten(item) for item in items),
                lambda items: tuple(inner.rebuild(item) for item in items),
            )
    return _Converter(_same, _same)


@functools.cache
def _row_converter(row_class: Any) -> _Converter:
    hints = get_type_hints(row_class)
    fields = [_converter(hints[name]) for name in row_class._fields]
    names = _NAMED + " ".join(row_class._fields)

    def flatten(row: Any) -> tuple[Any, ...]:
        return names, *(field.flatten(value) for field, value in zip(fields, row, strict=True))

    def rebuild(values: tuple[Any, ...]) -> Any:
        if values and values[0] == names:
            return row_class._make(field.rebuild(value) for field, value in zip(fields, values[1:], strict=True))
        return _of_another_version(row_class, dict(zip(row_class._fields, fields, strict=True)), values)

    return _Converter(flatten, rebuild)


def _of_another_version(row_class: Any, fields: dict[str, _Converter], values: tuple[Any, ...]) -> Any:
    """Builds a row from an encoded row of another version, which has other fields.

    Raises:
        ValueError: The row lacks a field that has no default.
    """
    if values and isinstance(values[0], str) and values[0].startswith(_NAMED):
        found = dict(zip(values[0].removeprefix(_NAMED).split(" "), values[1:], strict=True))
    else:
        found = _named(row_class, values)
    known = {name: fields[name].rebuild(value) for name, value in found.items() if name in fields}
    lacking = [name for name in fields if name not in known and name not in row_class._field_defaults]
    if lacking:
        raise ValueError(
            f"a {row_class.__name__} encoded by another version of af3pipe lacks {', '.join(lacking)}; drain "
            "the job with the version that started it, and start it again with this one"
        )
    return row_class(**known)


def _named(row_class: Any, values: Iterable[Any]) -> dict[str, Any]:
    """Names the values of a row of format 1, and converts them to the current format."""
    names = _FORMAT_1.get(row_class)
    if names is None:
        raise ValueError(
            f"this version of af3pipe cannot decode this {row_class.__name__}; drain the job with the "
            "version that started it, and start it again with this one"
        )
    found = dict(zip(names.split(" "), values, strict=True))
    if "metadata" in found:
        found["metadata"] = to_metadata(dict(found["metadata"]))
    if row_class is Answer:
        found["source_key"] = ""
    return found


class RowTupleCoder(coders.Coder, Generic[Row]):
    """Encodes one NamedTuple class of `af3pipe.schemas`, nested rows and PCM included."""

    def __init__(self, row_class: type[Row]) -> None:
        self._row_class: Any = row_class
        self._primitives = coders.FastPrimitivesCoder()

    @classmethod
    def from_type_hint(cls, typehint: type[Row], registry: object) -> "RowTupleCoder[Row]":
        return cls(typehint)

    def encode(self, value: Row) -> bytes:
        data: bytes = self._primitives.encode(_row_converter(self._row_class).flatten(value))
        return data

    def decode(self, encoded: bytes) -> Row:
        row: Row = _row_converter(self._row_class).rebuild(self._primitives.decode(encoded))
        return row

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> type[Row]:
        row_class: type[Row] = self._row_class
        return row_class

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowTupleCoder) and self._row_class is other._row_class

    def __hash__(self) -> int:
        return hash((type(self), self._row_class))


ROW_CLASSES: tuple[type, ...] = (
    Answer,
    AudioInfo,
    AudioObject,
    Covered,
    DeadLetter,
    Existing,
    Levels,
    Question,
    Recording,
    RecordingResult,
    RecordingRow,
    Segment,
    Task,
    TimedText,
)

for _row_class in ROW_CLASSES:
    registry.register_coder(_row_class, RowTupleCoder)
