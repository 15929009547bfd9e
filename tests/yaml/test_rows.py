"""Rows that went through Beam's own coder, as between two processes, are what they were."""

import apache_beam as beam
import pytest
from apache_beam.coders import RowCoder
from apache_beam.typehints.schemas import typing_to_runner_api
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.schemas import Answer, DeadLetter, Earlier, Recording, RecordingRow
from af3pipe.yaml.rows import _from_row, _to_row, row_type
from tests.rows import rows


@pytest.mark.parametrize("row_class", [Recording, Answer, DeadLetter, RecordingRow])
@settings(max_examples=30)
@given(data=st.data())
def test_rows_come_back(row_class, data):
    row = data.draw(rows(row_class))
    if "metadata" in row_class._fields:
        row = row._replace(metadata=tuple(dict(row.metadata).items()))  # a name is there once
    if row_class is Recording:
        row = row._replace(work_key=None, earlier=Earlier())  # not shown
    coder = RowCoder(typing_to_runner_api(row_type(row_class)).row_type.schema)
    shown = _to_row(row_class, row)
    assert isinstance(shown, beam.Row)
    assert _from_row(row_class, shown) == row
    assert _from_row(row_class, coder.decode(coder.encode(shown))) == row
