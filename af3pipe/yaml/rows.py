"""Our rows as Beam's schema'd rows and back, so that Beam YAML's own transforms can work on them.

The columns are those of the row's class. What Beam's schemas cannot say is said in their words: an enum is its text,
metadata is a map, a nested row is a row.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import UnionType
from typing import Any, NamedTuple, Optional, get_args, get_origin, get_type_hints

import apache_beam as beam
from apache_beam.typehints.row_type import RowTypeConstraint
from apache_beam.typehints.schemas import named_fields_from_element_type

from af3pipe.schemas import Recording

_NOT_SHOWN = {Recording: ("work_key", "earlier")}
"""They belong to resuming, which is no part of a YAML pipeline."""


class _Column(NamedTuple):
    """How one field is typed in a schema'd row, and its way there and back."""

    hint: Any
    to_row: Callable[[Any], Any]
    from_row: Callable[[Any], Any]


def _same(value: object) -> object:
    return value


def _column(hint: Any) -> _Column:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _Column(str, lambda member: member.value, hint)
    if hasattr(hint, "_fields"):
        # It stays what it is: as a beam.Row within a row, Beam's Parquet sink would not take it.
        return _Column(row_type(hint), _same, functools.partial(_from_row, hint))
    if hint == tuple[tuple[str, str], ...]:
        return _Column(Mapping[str, str], dict, lambda pairs: tuple((pairs or {}).items()))
    if get_origin(hint) is tuple:
        inner = _column(get_args(hint)[0])
        return _Column(
            Sequence[inner.hint],  # type: ignore[name-defined]
            list,
            lambda items: tuple(inner.from_row(item) for item in items or ()),
        )
    if isinstance(hint, UnionType):
        # Beam's schemas know Optional only: `str | None` would be an object that only Python can read.
        hint = Optional[get_args(hint)[0]]  # noqa: UP045
    return _Column(hint, _same, _same)


@functools.cache
def _columns(row_class: Any) -> dict[str, _Column]:
    hints = get_type_hints(row_class)
    hidden = _NOT_SHOWN.get(row_class, ())
    return {name: _column(hints[name]) for name in row_class._fields if name not in hidden}


@functools.cache
def row_type(row_class: Any) -> RowTypeConstraint:
    """The schema of a class of rows, as Beam has it."""
    return RowTypeConstraint.from_fields([(name, column.hint) for name, column in _columns(row_class).items()])


def _to_row(row_class: Any, row: Any) -> beam.Row:
    return beam.Row(**{name: column.to_row(getattr(row, name)) for name, column in _columns(row_class).items()})


def _from_row(row_class: Any, row: Any) -> Any:
    found = row._asdict()
    return row_class(**{name: column.from_row(found[name]) for name, column in _columns(row_class).items()})


class ToRows(beam.PTransform):
    """Rows of one of our classes to schema'd rows."""

    def __init__(self, row_class: Any) -> None:
        super().__init__()
        self._row_class = row_class

    def expand(self, rows: Any) -> Any:
        return rows | beam.Map(functools.partial(_to_row, self._row_class)).with_output_types(
            row_type(self._row_class)
        )


class FromRows(beam.PTransform):
    """Schema'd rows with the columns of one of our classes to rows of that class.

    Raises:
        ValueError: The input lacks a column, or has one that the class does not have.
    """

    def __init__(self, row_class: Any) -> None:
        super().__init__()
        self._row_class = row_class

    def expand(self, rows: Any) -> Any:
        wanted = _columns(self._row_class)
        name = self._row_class.__name__
        try:
            found = [column for column, _ in named_fields_from_element_type(rows.element_type)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"its input has no rows of {name}, but {rows.element_type}") from error
        missing = [column for column in wanted if column not in found]
        if missing:
            raise ValueError(f"its input has no column {', '.join(missing)}, as rows of {name} have")
        unknown = [column for column in found if column not in wanted]
        if unknown:
            raise ValueError(
                f"its input has a column {', '.join(unknown)}, which rows of {name} do not have; drop it, or "
                "write these rows with a sink of Beam's own"
            )
        return rows | beam.Map(functools.partial(_from_row, self._row_class)).with_output_types(self._row_class)
