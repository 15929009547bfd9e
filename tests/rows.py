"""Hypothesis strategies for every row type, derived from the annotations, so that new fields are covered at once."""

from datetime import timezone
from enum import Enum
from typing import get_args, get_origin, get_type_hints

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from af3pipe.schemas import to_metadata

_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
_BASIC = {
    str: _TEXT,
    int: st.integers(0, 2**31 - 1),
    float: st.floats(0, 1e6, allow_nan=False),
    bool: st.booleans(),
    type(None): st.none(),
}
_MOMENTS = st.datetimes(timezones=st.just(timezone.utc)).map(lambda moment: moment.isoformat())
METADATA = st.dictionaries(_TEXT, _TEXT | st.integers() | st.booleans() | st.none(), max_size=3).map(to_metadata)
_BY_NAME = {"metadata": METADATA, "mtime": st.none() | _MOMENTS}
"""Text that has a form of its own."""


def rows(row_class):
    hints = get_type_hints(row_class)
    fields = (_BY_NAME[name] if name in _BY_NAME else _values(hints[name]) for name in row_class._fields)
    return st.tuples(*fields).map(row_class._make)


def _values(hint):
    if hint in _BASIC:
        return _BASIC[hint]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    if hasattr(hint, "_fields"):
        return rows(hint)
    if get_origin(hint) is np.ndarray:
        return npst.arrays(np.float32, st.integers(0, 40), elements=st.floats(-1, 1, width=32))
    if get_origin(hint) is tuple and get_args(hint)[-1] is ...:
        return st.lists(_values(get_args(hint)[0]), max_size=3).map(tuple)
    if get_origin(hint) is tuple:
        return st.tuples(*map(_values, get_args(hint)))
    return st.one_of(*map(_values, get_args(hint)))
