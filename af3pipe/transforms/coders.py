"""How our rows cross processes: compact, without pickling, and with their class kept.

A RowCoder gives back an anonymous `BeamSchema_...` class in another process, and pickling a NumPy array costs more
than its bytes. So a row is flattened to plain tuples for Beam's FastPrimitivesCoder, PCM goes as raw bytes, and
the row's class is built again from its own annotations.
"""

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from apache_beam import coders
from apache_beam.coders import registry

from af3pipe.schemas import (
    Answer,
    AudioInfo,
    Covered,
    DeadLetter,
    Earlier,
    Levels,
    Question,
    Recording,
    RecordingResult,
    Segment,
    Task,
    TimedText,
)

Row = TypeVar("Row")
_PCM = np.dtype("<f4")


class _Converter(NamedTuple):
    """One field's way out and back."""

    flatten: Callable[[Any], Any]
    rebuild: Callable[[Any], Any]


def _same(value: object) -> object:
    return value


def _converter(hint: object) -> _Converter:
    """Chosen once per class, by annotation; most fields are primitives and go as they are."""
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

    def flatten(row: Any) -> tuple[Any, ...]:
        return tuple(field.flatten(value) for field, value in zip(fields, row, strict=True))

    def rebuild(values: tuple[Any, ...]) -> Any:
        return row_class._make(field.rebuild(value) for field, value in zip(fields, values, strict=True))

    return _Converter(flatten, rebuild)


class RowTupleCoder(coders.Coder, Generic[Row]):
    """Codes one NamedTuple class of `af3pipe.schemas`, nested rows and PCM included."""

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
    Covered,
    DeadLetter,
    Earlier,
    Levels,
    Question,
    Recording,
    RecordingResult,
    Segment,
    Task,
    TimedText,
)

for _row_class in ROW_CLASSES:
    registry.register_coder(_row_class, RowTupleCoder)
