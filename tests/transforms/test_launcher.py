"""What is sent to a worker begins with the launcher's versions, and is not unpickled where others run."""

import base64
import bz2
import os
import pickle
import subprocess
import sys

import apache_beam as beam
import pytest
from apache_beam.internal import pickler
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.testing.util import assert_that, equal_to

from af3pipe.models import EngineOptions, ModelError, caption
from af3pipe.transforms import AskAudioFlamingo, DecodeAudio
from af3pipe.transforms.answer import AnswerDoFn
from af3pipe.transforms.ask import Asker, _AskDoFn
from af3pipe.transforms.decode import _DecodeDoFn
from af3pipe.transforms.launcher import CheckWorkers, Launcher, WorkerError, received, this_process
from af3pipe.transforms.plan import PlanDoFn
from af3pipe.transforms.resume import _PlanEachDoFn

_opened = []


class Opened:
    """Notes that it was unpickled."""

    def __reduce__(self):
        return _open, ()


def _open():
    _opened.append(True)


@pytest.fixture(autouse=True)
def _nothing_opened():
    _opened.clear()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"af3pipe": "0.0.7"}, f"af3pipe {this_process().af3pipe} (launcher: 0.0.7)"),
        ({"beam": "2.60"}, f"Apache Beam {this_process().beam} (launcher: 2.60)"),
        ({"python": "3.9"}, f"Python {this_process().python} (launcher: 3.9)"),
    ],
)
def test_other_versions_are_told_before_anything_else_is_unpickled(changed, says):
    sent = pickle.dumps((this_process()._replace(host="desk", **changed), Opened()))
    with pytest.raises(WorkerError) as error:
        pickle.loads(sent)
    assert says in str(error.value)
    assert f"worker {this_process().host} has another version than the launcher desk" in str(error.value)
    assert sys.executable in str(error.value)
    assert not _opened
    pickle.loads(pickle.dumps((this_process(), Opened())))
    assert _opened


def test_a_patch_of_beam_or_python_is_no_other_version():
    assert this_process().beam == ".".join(beam.__version__.split(".")[:2])
    assert this_process().python == f"{sys.version_info.major}.{sys.version_info.minor}"


DECODER = DecodeAudio(model="demo").decoder
ASKER = AskAudioFlamingo(model="demo", device="cpu", tasks=[caption()]).asker


@pytest.mark.parametrize(
    "dofn",
    [
        ASKER,
        DECODER,
        _AskDoFn(ASKER),
        _DecodeDoFn(DECODER),
        PlanDoFn(DECODER, ASKER, {}),
        _PlanEachDoFn("out", DECODER, ASKER, {}),
    ],
    ids=lambda found: type(found).__name__,
)
def test_a_step_arrives_as_it_was_sent_and_knows_its_launcher(dofn):
    for load in (pickler.loads(pickler.dumps(dofn)), pickle.loads(pickle.dumps(dofn))):
        left = dict(vars(load))
        assert left.pop("launcher") == this_process()
        assert {key: shown(value) for key, value in left.items()} == {k: shown(v) for k, v in vars(dofn).items()}
    sent = pickle.dumps(dofn)
    assert b"received" in sent[:200]  # the versions come first
    assert sent.index(b"received") < sent.index(type(dofn).__name__.encode())


def shown(value):
    """Without the address of what has no text of its own."""
    return type(value).__name__ if isinstance(value, Asker | type(DECODER)) else str(value)


def test_the_step_that_answers_knows_its_launcher_by_its_parts():
    sent = pickler.loads(pickler.dumps(AnswerDoFn(DECODER, ASKER)))
    assert sent._asker.launcher == sent._decoder.launcher == this_process()


def test_a_model_that_only_the_launcher_has_says_which_worker_lacks_it():
    dofn = Asker(EngineOptions("/no/such/model", device="cpu"), [caption()])
    with pytest.raises(ModelError) as here:
        dofn.setup()
    assert "worker" not in str(here.value)
    code = "import pickle, sys; pickle.load(sys.stdin.buffer).setup()"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(dofn), capture_output=True, timeout=120)
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith(f"af3pipe.models.engine.ModelError: worker {os.uname().nodename}: ")
    assert "/no/such/model" in last
    assert "at this same absolute path; or name a hub id" in last


def test_what_is_sent_does_not_change_its_place():
    # A worker of another version must find it to be able to tell.
    assert (received.__module__, received.__qualname__) == ("af3pipe.transforms.launcher", "received")
    assert Launcher._fields == ("af3pipe", "beam", "python", "host", "pid")


def test_names_are_given_once_each():
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        names = pipeline | CheckWorkers(["b", "a", "b"])
        assert_that(names, equal_to(["a", "b"]))


def test_the_first_stage_carries_no_byte_code():
    """A function that is pickled by value is byte code, which another Python may crash on."""
    pipeline = beam.Pipeline()
    _ = pipeline | CheckWorkers(["a.wav"])
    (payload,) = [
        beam_runner_api_pb2.ParDoPayload.FromString(node.spec.payload).do_fn.payload
        for node in pipeline.to_runner_api().components.transforms.values()
        if node.unique_name.endswith("/Check") and node.spec.urn == "beam:transform:pardo:v1"
    ]
    assert b"_make_function" not in _unpacked(payload)
    assert b"_make_function" in _unpacked(pickler.dumps(lambda element: [element]))


def _unpacked(pickled):
    """Beam packs what it pickles."""
    return bz2.decompress(base64.b64decode(pickled))
