"""Converts rows of this package to Beam schema'd rows, so that Beam YAML's own transforms can process them.

The columns are those of the row's class; an enum is its text, metadata is JSON text, a nested row is a row.
"""

import functools
from collections.abc import Callable, Sequence
from enum import Enum
from types import UnionType
from typing import Any, NamedTuple, Optional, get_args, get_origin, get_type_hints

import apache_beam as beam
from apache_beam.typehints.row_type import RowTypeConstraint


class _Column(NamedTuple):
    """Says how one field is typed in a schema'd row, and how its values are converted."""

    hint: Any
    convert: Callable[[Any], Any]


def _same(value: object) -> object:
    return value


def _column(hint: Any) -> _Column:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _Column(str, lambda member: member.value)
    if hasattr(hint, "_fields"):
        # It stays what it is: as a beam.Row within a row, Beam's Parquet sink would not take it.
        return _Column(row_type(hint), _same)
    if get_origin(hint) is tuple:
        inner = _column(get_args(hint)[0])
        return _Column(Sequence[inner.hint], list)  # type: ignore[name-defined]
    if isinstance(hint, UnionType):
        # Beam's schemas know Optional only: `str | None` would be an object that only Python can read.
        hint = Optional[get_args(hint)[0]]  # noqa: UP045
    return _Column(hint, _same)


@functools.cache
def _columns(row_class: Any) -> dict[str, _Column]:
    hints = get_type_hints(row_class)
    return {name: _column(hints[name]) for name in row_class._fields}


@functools.cache
def row_type(row_class: Any) -> RowTypeConstraint:
    """Returns the Beam schema of a row class."""
    return RowTypeConstraint.from_fields([(name, column.hint) for name, column in _columns(row_class).items()])


def _to_row(row_class: Any, row: Any) -> beam.Row:
    return beam.Row(**{name: column.convert(getattr(row, name)) for name, column in _columns(row_class).items()})


class ToRows(beam.PTransform):
    """Converts rows of one class of `af3pipe.schemas` to Beam schema'd rows."""

    def __init__(self, row_class: Any) -> None:
        super().__init__()
        self._row_class = row_class

    def expand(self, rows: Any) -> Any:
        return rows | beam.Map(functools.partial(_to_row, self._row_class)).with_output_types(
            row_type(self._row_class)
        )
