"""Rows in Parquet; keys and ids, which tell work apart and stay what they are."""

import json
import math
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.schemas import (
    NO_METADATA,
    Decoding,
    Recording,
    Task,
    answer_key,
    channel_text,
    source_key,
    stream_index,
    to_metadata,
)
from af3pipe.storage.parquet import ParquetFile
from af3pipe.tables.write import ANSWERS, DEAD_LETTER_ROWS, RECORDINGS, to_table
from tests.rows import rows

FORMATS = pytest.mark.parametrize(
    "row_format", [ANSWERS, DEAD_LETTER_ROWS, RECORDINGS], ids=lambda found: found.row_class.__name__
)


@FORMATS
def test_columns_are_the_fields(row_format):
    assert set(row_format.schema.names) == set(row_format.row_class._fields)


@FORMATS
@given(data=st.data())
@settings(max_examples=30)
def test_rows_survive_parquet(row_format, data):
    written = data.draw(st.lists(rows(row_format.row_class), min_size=1, max_size=4))
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(written, row_format.schema), sink)
    read = ParquetFile(pa.BufferReader(sink.getvalue())).read()
    assert read.schema.equals(row_format.schema)
    assert read.schema.metadata[b"af3pipe.format"] == b"2"
    assert to_table(written, row_format.schema).equals(read)
    for row, found in zip(written, read.to_pylist(), strict=True):
        assert found["recording_id"] == row.recording_id
        if "segments" in found:
            assert [tuple(piece.values()) for piece in found["segments"]] == [tuple(piece) for piece in row.segments]
        if "metadata" in found:
            assert found["metadata"] == row.metadata
        if "mtime" in found:
            assert found["mtime"] == (row.mtime and datetime.fromisoformat(row.mtime))


BASE = Recording("id", "s3://b/a.flac", 10, "etag", None)
TASK = Task("caption", "Describe the audio in detail.")


def key(recording=BASE, start_s=0.0, end_s=1.0, task=TASK, model="m", revision="r"):
    return answer_key(recording, start_s, end_s, task, model, revision)


def test_the_same_work_has_the_same_key_whatever_the_metadata():
    assert key() == key(BASE._replace(metadata='{"speaker": 7}', recording_id="other"))


@pytest.mark.parametrize(
    "changed",
    [
        {"recording": BASE._replace(etag="new")},
        {"recording": BASE._replace(uri="s3://b/b.flac")},
        {"recording": BASE._replace(channel="left")},
        {"recording": BASE._replace(stream=0)},
        {"start_s": 0.5},
        {"end_s": 2.0},
        {"task": TASK._replace(prompt="Describe it.")},
        {"task": TASK._replace(decoding=Decoding(max_new_tokens=9))},
        {"model": "n"},
        {"revision": "s"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_work_has_another_key(changed):
    assert key(**changed) != key()


def test_without_an_etag_size_and_time_stand_for_the_content():
    local = Recording("id", "/a.flac", 10, None, "2026-01-01T00:00:00Z")
    assert local.content_identity != local._replace(size_bytes=11).content_identity
    assert local.content_identity != local._replace(mtime="2026-01-02T00:00:00Z").content_identity


def test_ids_and_keys_are_those_of_the_versions_before_channels_could_be_chosen():
    assert source_key("s3://b/a.flac", 1.0, 2.0) == "5fe382f0a421add3df56"
    assert key() == "a014aaf69743c124e4f3f5d05be5b42fe61b2a594516c1486b2a612886316e9e"


@pytest.mark.parametrize(("given", "text"), [("MIX", "mix"), (" left", "left"), (1, "1"), ("1", "1"), (2.0, "2")])
def test_a_channel_has_one_spelling(given, text):
    assert channel_text(given) == text


@pytest.mark.parametrize("given", ["middle", -1, 1.5, True, None, "", "nan", [0]])
def test_what_is_no_channel_or_stream_is_told(given):
    with pytest.raises(ValueError, match="channel is"):
        channel_text(given)
    if given is not None:
        with pytest.raises(ValueError, match="stream is"):
            stream_index(given)


def test_recording_ids_tell_ranges_and_channels_of_one_file_apart():
    ids = {
        source_key("a", channel="left"),
        source_key("a", channel="right"),
        source_key("a", stream=0),
        source_key("a"),
        source_key("a", 1.0),
        source_key("a", 1.0, 2.0),
        source_key("b"),
    }
    assert len(ids) == 7


def test_decoding_is_readable_json():
    assert json.loads(Decoding(max_new_tokens=7).to_json())["max_new_tokens"] == 7


@given(
    st.dictionaries(
        st.text(max_size=9), st.integers() | st.floats() | st.text(max_size=9) | st.none() | st.booleans()
    )
)
def test_metadata_is_json_in_one_spelling(columns):
    text = to_metadata(columns)
    assert to_metadata(dict(reversed(columns.items()))) == text
    expected = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in columns.items()
    }
    assert json.loads(text) == expected
    assert to_metadata({}) == NO_METADATA


def test_metadata_keeps_what_json_has_no_word_for_as_text():
    day = datetime(2026, 1, 2).date()
    found = json.loads(to_metadata({"day": day, "nested": [{"n": float("nan")}, (1, float("inf"))], 7: "seven"}))
    assert found == {"day": "2026-01-02", "nested": [{"n": None}, [1, None]], "7": "seven"}
