import pickle
import subprocess
import sys

import numpy as np
import pytest
from apache_beam.coders import registry
from hypothesis import given, settings
from hypothesis import strategies as st

from af3pipe.schemas import AudioInfo, Levels, Recording, Segment
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
    assert len(encoded) < pcm.nbytes + 200
    assert b"numpy" not in encoded


def test_decoded_pcm_can_be_written_to_or_copied_by_torch_without_a_warning():
    coder = RowTupleCoder(Segment)
    decoded = coder.decode(coder.encode(segment(np.zeros(4, np.float32)))).samples
    assert decoded.flags.writeable


def test_class_is_kept_in_another_process():
    recording = Recording("id", "a.wav", metadata=(("speaker", "7"),))
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
    assert seen.strip() == "af3pipe.schemas.recording Recording (('speaker', '7'),)"
