"""What is found before anything is started, and what only the workers can know."""

import pytest

from af3pipe.models import ModelError, open_checkpoint
from af3pipe.models.family import ADAPTER_CONFIG, adapter_revision
from af3pipe.pipelines.batch import preflight
from af3pipe.pipelines.beam_flags import beam_options
from af3pipe.pipelines.job import make_job
from af3pipe.pipelines.report import _model_record
from tests import fixtures_audio as make


@pytest.fixture
def values(tmp_path):
    (tmp_path / "a.wav").write_bytes(make.wav(make.sound(1, 16000), 16000))
    return {"inputs": [str(tmp_path / "a.wav")], "output": str(tmp_path / "out"), "model": "demo"}


def test_an_adapter_that_is_missing_is_found_before_the_job_starts(values, tmp_path):
    job = make_job(values | {"adapter": str(tmp_path / "none")})
    with pytest.raises(ModelError, match="no such directory"):
        preflight(job, beam_options(job))


def test_workers_elsewhere_may_have_an_adapter_that_this_machine_has_not(values, tmp_path, caplog):
    job = make_job(values | {"adapter": str(tmp_path / "none")})
    options = beam_options(job, ["--runner=PrismRunner", "--environment_type=EXTERNAL"])
    assert preflight(job, options) == open_checkpoint("demo")
    assert "the adapter cannot be read on this machine, so only the workers can check it" in caplog.text
    assert str(tmp_path / "none") in caplog.text


def test_the_record_names_the_weights_that_answered(values, tmp_path):
    (tmp_path / ADAPTER_CONFIG).write_text("{}")
    demo = open_checkpoint("demo")
    told = {"adapter": str(tmp_path), "quantize": "int8"}
    record = _model_record(make_job(values | told), demo)
    assert record["revision"] == f"{demo.revision}+{adapter_revision(str(tmp_path))}+int8"
    assert {key: record[key] for key in told} == told
    assert _model_record(make_job(values), demo)["revision"] == demo.revision
    elsewhere = _model_record(make_job(values | {"adapter": str(tmp_path / "none")}), demo)
    assert (elsewhere["revision"], elsewhere["adapter"]) == (None, str(tmp_path / "none"))
