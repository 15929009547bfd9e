"""Word of the end of a stream."""

import time

import apache_beam as beam
import pytest

from af3pipe.transforms.end_signal import SignalEnd


def slow(item, folder):
    time.sleep(0.5)
    assert not (folder / "ended").exists()
    return item


@pytest.mark.parametrize("items", [["a", "b"], []], ids=["something", "nothing"])
def test_it_is_written_when_all_is_done(items, tmp_path):
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        last = pipeline | beam.Create(items, reshuffle=False).with_output_types(str) | beam.Map(slow, folder=tmp_path)
        _ = last | SignalEnd(str(tmp_path / "ended"))
    assert (tmp_path / "ended").read_bytes() == b""
