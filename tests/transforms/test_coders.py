"""Rows between processes, and between versions: what this one writes, and what the one before wrote."""

import base64
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from apache_beam.coders import registry
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.schemas import (
    Answer,
    AudioInfo,
    AudioObject,
    Covered,
    DeadLetter,
    Existing,
    Levels,
    Question,
    Reason,
    Recording,
    Segment,
    Stage,
    TimedText,
)
from af3pipe.transforms.coders import ROW_CLASSES, RowTupleCoder
from tests.rows import rows


def equal(left, right):
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("row_class", ROW_CLASSES, ids=lambda row_class: row_class.__name__)
@given(data=st.data())
@settings(max_examples=40)
def test_round_trip_keeps_value_and_class(row_class, data):
    row = data.draw(rows(row_class))
    coder = registry.get_coder(row_class)
    assert isinstance(coder, RowTupleCoder)
    assert equal(coder.decode(coder.encode(row)), row)


def segment(samples):
    recording = Recording("id", "gs://bucket/Grüße aus Köln.flac")
    info = AudioInfo(1.0, 16000, 1, "flac", "soundfile")
    return Segment(recording, info, 0, 0.0, 1.0, True, 16000, samples, Levels(0.0, -4.8, 0.0, False))


def test_pcm_is_carried_as_its_bytes_alone():
    pcm = np.linspace(-1, 1, 480_000, dtype=np.float32)
    encoded = RowTupleCoder(Segment).encode(segment(pcm))
    assert len(encoded) < pcm.nbytes + 1000  # names of fields
    assert b"numpy" not in encoded


def test_decoded_pcm_can_be_written_to_or_copied_by_torch_without_a_warning():
    coder = RowTupleCoder(Segment)
    decoded = coder.decode(coder.encode(segment(np.zeros(4, np.float32)))).samples
    assert decoded.flags.writeable


def test_class_is_kept_in_another_process():
    recording = Recording("id", "a.wav", metadata='{"speaker": 7}')
    coder = RowTupleCoder(Recording)
    code = (
        "import pickle, sys; coder, data = pickle.load(sys.stdin.buffer); row = coder.decode(data);"
        "print(type(row).__module__, type(row).__name__, row.metadata)"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((coder, coder.encode(recording))),
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert seen.strip() == 'af3pipe.schemas.recording Recording {"speaker": 7}'


# --- rows of other versions

FORMAT_1 = json.loads((Path(__file__).parent / "format1" / "coders.json").read_text())


def of_format_1(row_class):
    return RowTupleCoder(row_class).decode(base64.b64decode(FORMAT_1[row_class.__name__]))


def test_a_recording_of_the_version_before_is_decoded():
    found = of_format_1(Recording)
    assert found == Recording(
        recording_id="id-1",
        uri="s3://archive/a.flac",
        size_bytes=123,
        etag="etag1",
        mtime="2026-11-01T00:00:00+00:00",
        offset_s=1.5,
        duration_s=2.5,
        questions=(Question("q", "What?", ("yes", "no")),),
        metadata='{"row": "1", "speaker": "Ada"}',
        channel="left",
        stream=1,
        work_key="work",
        existing=Existing(
            (Covered("k1", "caption/", ((0.0, 1.5),), 1.5, Levels(-3.5, -20.25, 0.0, False), "etag1"),),
            (("d1", "run-1"),),
        ),
    )
    assert type(found.existing.answers[0].levels) is Levels


def test_a_dead_letter_of_the_version_before_is_decoded():
    found = of_format_1(DeadLetter)
    assert found[:5] == ("id-1", "s3://archive/a.flac", Stage.DECODE, Reason.DECODE_ERROR, "broken")
    assert (found.decoder, found.position_s, found.attempts, found.run_id) == ("pyav", 1.0, 1, "run-1")
    assert found.metadata == "{}"
    assert type(found.reason) is Reason


def test_an_answer_of_the_version_before_is_decoded():
    found = of_format_1(Answer)
    assert (found.recording_id, found.uri, found.source_key) == ("id-1", "s3://archive/a.flac", "")
    assert (found.task, found.prompt, found.text, found.answer_key) == ("caption", "Say.", "text", "k1")
    assert found.segments == (TimedText(0.0, 1.5, "text"),)
    assert (found.metadata, found.run_id) == ('{"row": "1"}', "run-1")
    assert (found.model_id, found.new_tokens, found.silent) == ("m", 5, False)


def test_a_row_that_the_version_before_did_not_shuffle_is_refused_with_what_to_do():
    old = RowTupleCoder(Recording)._primitives.encode(("a.wav", ()))
    with pytest.raises(ValueError, match=r"this version of af3pipe cannot decode this AudioObject; drain the job"):
        RowTupleCoder(AudioObject).decode(old)


class _Inner(NamedTuple):
    one: int
    two: str = "two"


class _Row(NamedTuple):
    first: str
    inner: _Inner
    last: tuple[_Inner, ...] = ()


class _LaterInner(NamedTuple):
    two: str
    one: int
    three: float = 3.0


class _Later(NamedTuple):
    """Fields are swapped, two are new, one of them inside; all that is new has a default."""

    last: tuple[_LaterInner, ...]
    inner: _LaterInner
    first: str
    added: Stage = Stage.LIST
    unused: tuple[str, ...] = ("a",)


class _Needs(NamedTuple):
    first: str
    inner: _Inner
    needed: str
    also: int


ROW = _Row("f", _Inner(1), (_Inner(2, "b"), _Inner(3)))


def test_fields_that_were_swapped_or_added_are_found_by_name():
    found = RowTupleCoder(_Later).decode(RowTupleCoder(_Row).encode(ROW))
    inner = _LaterInner("two", 1)
    assert found == _Later((_LaterInner("b", 2), _LaterInner("two", 3)), inner, "f")
    assert type(found.inner) is _LaterInner
    assert {type(one) for one in found.last} == {_LaterInner}


def test_fields_that_this_version_does_not_know_are_ignored():
    later = _Later((_LaterInner("b", 2, 9.0),), _LaterInner("two", 1), "f", Stage.DECODE, ("x", "y"))
    assert RowTupleCoder(_Row).decode(RowTupleCoder(_Later).encode(later)) == _Row("f", _Inner(1), (_Inner(2, "b"),))


def test_a_field_without_a_default_that_a_row_lacks_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"a _Needs encoded by another version .* lacks needed, also; drain the job"):
        RowTupleCoder(_Needs).decode(RowTupleCoder(_Row).encode(ROW))


@given(data=st.data())
@settings(max_examples=20)
def test_a_row_of_this_version_with_fewer_fields_has_the_defaults(data):
    """As one that was written before a field with a default was added."""
    row = data.draw(rows(Recording))
    known = data.draw(st.sets(st.sampled_from(Recording._fields[2:])))
    names = [name for name in Recording._fields if name not in known]
    fewer = NamedTuple("Fewer", [(name, Recording.__annotations__[name]) for name in names])
    given_ = fewer(*(getattr(row, name) for name in names))
    found = RowTupleCoder(Recording).decode(RowTupleCoder(fewer).encode(given_))
    assert equal(found, row._replace(**{name: Recording._field_defaults[name] for name in known}))
