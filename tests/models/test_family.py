import json
import subprocess
import sys

import pytest

from af3pipe.models import DEFAULT_MODEL, ModelError, open_checkpoint
from af3pipe.models import family as family_module


def save(path, config, processor=None, **files):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (path / "processor_config.json").write_text(json.dumps(processor))
    for name, text in files.items():
        (path / name.replace("_md", ".md").replace("_json", ".json")).write_text(text)
    return path


WHISPER = {"sampling_rate": 16000, "chunk_length": 30, "hop_length": 160}
AF3 = {"model_type": "audioflamingo3"}


def test_the_demo_checkpoint():
    demo = open_checkpoint("demo")
    assert (demo.model_id, demo.family) == ("demo", "AudioFlamingo3")
    assert demo.limits == (16_000, 9_600_000, 321, 480_000)
    assert demo.limits.max_s == 600
    assert demo.licence == "CC BY-SA 4.0"
    assert demo.audio_tokens(480_000) == 750


def test_limits_come_from_the_files(tmp_path):
    processor = {
        "max_audio_len": 95,
        "feature_extractor": {"sampling_rate": 8000, "chunk_length": 10, "hop_length": 80},
    }
    limits = open_checkpoint(str(save(tmp_path, AF3, processor))).limits
    assert limits == (8000, 9 * 80_000, 161, 80_000)


@pytest.mark.parametrize(
    ("model_type", "family", "max_s"),
    [("audioflamingo3", "AudioFlamingo3", 600), ("musicflamingo", "MusicFlamingo", 1200)],
)
def test_without_max_audio_len_the_processor_class_decides(tmp_path, model_type, family, max_s):
    """And an older layout: the feature extractor in a file of its own."""
    path = save(tmp_path, {"model_type": model_type}, {}, preprocessor_config_json=json.dumps(WHISPER))
    checkpoint = open_checkpoint(str(path))
    assert (checkpoint.family, checkpoint.limits.max_s) == (family, max_s)
    from transformers import AudioFlamingo3Processor, MusicFlamingoProcessor

    classes = {"AudioFlamingo3": AudioFlamingo3Processor, "MusicFlamingo": MusicFlamingoProcessor}
    assert classes[family].__init__.__kwdefaults__ is None
    assert classes[family].__init__.__defaults__[-1] == max_s


def test_a_directory_names_its_content(tmp_path):
    path = save(tmp_path, AF3, {"feature_extractor": WHISPER})
    (path / "model.safetensors").write_bytes(bytes(100_000))
    before = open_checkpoint(str(path)).revision
    assert before == open_checkpoint(str(path)).revision
    (path / "model.safetensors").write_bytes(bytes(50_000) + b"\1" + bytes(49_999))
    assert before != open_checkpoint(str(path)).revision
    assert before.startswith("sha256:")
    assert len(before) == len("sha256:") + 12


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\nlanguage:\n- en\nlicense: other\nlicense_name: my-licence\n---\n", "my-licence"),
        ("---\nlicense: other\n---\n", "other"),
        ("# Model\nlicense: mit", "unknown"),
    ],
)
def test_licence_from_the_model_card(tmp_path, card, licence):
    path = save(tmp_path, AF3, {"feature_extractor": WHISPER}, README_md=card)
    assert open_checkpoint(str(path)).licence == licence


@pytest.mark.parametrize("model", ["/no/such/dir", "./no-such-dir", "no-such-dir", "~/no-such-dir"])
def test_a_directory_that_is_not_there(model):
    with pytest.raises(ModelError, match=r"looked for a checkpoint in /.*no such directory; give a directory"):
        open_checkpoint(model)


def test_a_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        open_checkpoint(str(tmp_path))


def test_another_kind_of_model(tmp_path):
    with pytest.raises(ModelError, match=r"'whisper' checkpoint; supported are .* audioflamingo3, musicflamingo"):
        open_checkpoint(str(save(tmp_path, {"model_type": "whisper"})))


def test_broken_files(tmp_path):
    with pytest.raises(ModelError, match=r"states no sampling_rate.*processor\.save_pretrained"):
        open_checkpoint(str(save(tmp_path, AF3)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json of the checkpoint is not JSON"):
        open_checkpoint(str(tmp_path))


def test_a_hub_id_that_is_not_cached():
    """No network in tests (tests/conftest.py): the message says where it looked and what to do."""
    with pytest.raises(ModelError, match=rf"(?s)model '{DEFAULT_MODEL}' at revision 'v9'.*cache.*hf download"):
        open_checkpoint(DEFAULT_MODEL, "v9")
    with pytest.raises(ModelError, match="no directory of that name"):
        open_checkpoint("not a name/at all!")


def test_a_hub_checkpoint_is_pinned_to_its_commit(monkeypatch, tmp_path):
    files = {"config.json": AF3, "processor_config.json": {"feature_extractor": WHISPER}}
    asked = []

    def download(model, name, revision):
        asked.append((name, revision))
        if name not in files:
            raise family_module.EntryNotFoundError(name)
        path = tmp_path / "snapshots" / ("c" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(files[name]))
        return str(path)

    monkeypatch.setattr(family_module, "hf_hub_download", download)
    checkpoint = open_checkpoint(DEFAULT_MODEL, "main")
    assert (checkpoint.revision, checkpoint.path, checkpoint.source) == ("c" * 40, None, DEFAULT_MODEL)
    assert checkpoint.licence == "NVIDIA OneWay Noncommercial License"
    assert asked[0] == ("config.json", "main")
    assert {revision for _, revision in asked[1:]} == {"c" * 40}


def test_no_torch_before_an_engine_is_opened():
    """A launcher without torch must be able to check a job and submit it."""
    code = (
        "import sys; from af3pipe.models import *; import af3pipe.models.scheduler; open_checkpoint('demo');"
        "resolve(caption(), 'AudioFlamingo3'); print([m for m in ('torch', 'transformers', 'apache_beam') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
