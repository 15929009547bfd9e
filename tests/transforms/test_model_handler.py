"""The engine behind Beam's own RunInference gives what AskAudioFlamingo gives."""

import gc
from importlib import resources

import apache_beam as beam
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.testing.util import assert_that

from af3pipe.models import EngineOptions, caption
from af3pipe.models.family import open_checkpoint
from af3pipe.schemas import DeadLetter, Recording
from af3pipe.transforms.decode import open_segments
from af3pipe.transforms.model_handler import AudioFlamingoModelHandler

OPTIONS = EngineOptions("demo", device="cpu", slots=4)


def segment(name):
    clip = resources.files("af3pipe.demo") / "clips" / name
    (found,) = open_segments(Recording(name, str(clip)), limits=open_checkpoint("demo").limits)
    return found


def test_run_inference(monkeypatch):
    good = segment("siren.flac")
    too_short = good._replace(recording=Recording("short", "short"), samples=good.samples[:100])

    def check(results):
        found = {result.example.recording.recording_id: result.inference for result in results}
        (reply,) = found["siren.flac"]
        assert reply.text == "A siren wailing up and down."
        assert reply.finish_reason == "stop"
        assert isinstance(found["short"], DeadLetter)  # and it cost its batch nothing
        assert found["short"].reason.value == "too_short"
        assert {result.model_id for result in results} == {"demo"}

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        results = (
            pipeline | beam.Create([good, too_short]) | RunInference(AudioFlamingoModelHandler(OPTIONS, [caption()]))
        )
        assert_that(results, check)


def test_the_model_is_let_go_when_run_inference_forgets_it():
    options = OPTIONS._replace(slots=3)  # Beam keeps the one of the last pipeline for the next
    held = AudioFlamingoModelHandler(options, [caption()]).load_model()
    engine = held.engine
    assert engine.is_open
    del held
    gc.collect()
    assert not engine.is_open


def test_mistakes_are_found_while_the_graph_is_built():
    with pytest.raises(ValueError, match="tasks is empty"):
        AudioFlamingoModelHandler(OPTIONS, [])
    with pytest.raises(ValueError, match="inference_args"):
        (
            beam.Pipeline()
            | beam.Create([])
            | RunInference(AudioFlamingoModelHandler(OPTIONS, [caption()]), inference_args={"temperature": 1})
        )


def test_size_of_a_batch_is_that_of_its_samples():
    handler = AudioFlamingoModelHandler(OPTIONS, [caption()])
    found = segment("siren.flac")
    assert handler.get_num_bytes([found, found]) == 2 * found.samples.nbytes
