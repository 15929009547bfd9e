"""Rows for Beam YAML come back from Beam's own coder, as between two processes, as they were."""

from enum import Enum

import apache_beam as beam
import pytest
from apache_beam.coders import RowCoder
from apache_beam.typehints.schemas import typing_to_runner_api
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.schemas import Answer, DeadLetter, RecordingRow
from af3pipe.yaml.rows import _to_row, row_type
from tests.rows import rows


def plain(value):
    """A value as rows for Beam YAML hold it."""
    if isinstance(value, Enum):
        return value.value
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("row_class", [Answer, DeadLetter, RecordingRow])
@settings(max_examples=30)
@given(data=st.data())
def test_rows_have_every_column_and_survive_the_coder(row_class, data):
    row = data.draw(rows(row_class))
    coder = RowCoder(typing_to_runner_api(row_type(row_class)).row_type.schema)
    shown = _to_row(row_class, row)
    assert isinstance(shown, beam.Row)
    expected = {name: plain(value) for name, value in row._asdict().items()}
    for found in (shown, coder.decode(coder.encode(shown))):
        assert {name: plain(getattr(found, name)) for name in row_class._fields} == expected
