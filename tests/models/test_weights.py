"""What `load_model` makes of a checkpoint: the adapter in its weights, the language model in fewer bits."""

import copy
import shutil
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from af3pipe.models import ModelError, caption, model_revision, open_checkpoint, resolve
from af3pipe.models.family import adapter_revision
from af3pipe.models.inputs import Inputs
from af3pipe.models.oracle import Oracle
from af3pipe.models.weights import load_model
from af3pipe.schemas import Turn
from tests.models.conftest import clip, sounds

CLIPS = ("beeps_three_low", "command_open_door", "digits_seven_three_one")
CPU = torch.device("cpu")
LORA = peft.LoraConfig(
    r=3, lora_alpha=12, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)", alpha_pattern={"v_proj": 5}
)
# As the released checkpoint names its weights, which is not what transformers calls its modules any more.
NON_LORA = {
    "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
    "audio_tower.layers.0.fc1.bias": "model.audio_tower.layers.0.fc1.bias",
}


def load(path, **options):
    return load_model(open_checkpoint(str(path)), CPU, torch.float32, **options)


def stock(path):
    return transformers.AudioFlamingo3ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def think(tiny_af3, tmp_path_factory):
    """A LoRA that does something, saved by peft, and other weights beside it: what AF3-Think consists of."""
    folder = tmp_path_factory.mktemp("adapters") / "think"
    torch.manual_seed(7)
    adapted = peft.get_peft_model(stock(tiny_af3), copy.deepcopy(LORA))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    state = stock(tiny_af3).state_dict()
    torch.save(
        {name: torch.randn_like(state[now]) * 0.3 for name, now in NON_LORA.items()},
        folder / "non_lora_trainables.bin",
    )
    return folder


def changed(folder, to, edit):
    """A copy of an adapter whose LoRA weights were edited."""
    shutil.copytree(folder, to)
    path = to / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})
    return to


def as_released(weights):
    """LoRA weights under the names they had when the released adapter was made."""
    new, old = "base_model.model.model.language_model.", "base_model.model.language_model.model."
    assert any(name.startswith(new) for name in weights)
    return {name.replace(new, old): value for name, value in weights.items()}


def logits(model, path):
    inputs = Oracle(None, model, Inputs.load(open_checkpoint(str(path))).processor).inputs(
        [sounds(2.0)], (Turn("What is it?"),)
    )
    with torch.inference_mode():
        return model(**inputs).logits


def by_hand(tiny_af3, think):
    """Low-rank products added to the weights, and the others copied: no peft, no renaming by anybody."""
    model = stock(tiny_af3)
    state = model.state_dict()  # shares memory with the model
    lora = load_file(think / "adapter_model.safetensors")
    for name, value in torch.load(think / "non_lora_trainables.bin", weights_only=True).items():
        state[NON_LORA[name]].copy_(value)
    downs = [name for name in lora if name.endswith(".lora_A.weight")]
    assert len(downs) == 2 * 3
    for down in downs:
        scale = (5 if "v_proj" in down else 12) / 3
        product = lora[down.replace("lora_A", "lora_B")] @ lora[down]
        target = down.removeprefix("base_model.model.").replace("lora_A.", "")
        state[target].add_(scale * product)
    return model


@pytest.mark.parametrize("names", ["current", "released"])
def test_an_adapter_is_merged_with_all_that_belongs_to_it(tiny_af3, think, tmp_path, names):
    folder = think if names == "current" else changed(think, tmp_path / "think", as_released)
    model = load(tiny_af3, adapter=str(folder))
    torch.testing.assert_close(logits(model, tiny_af3), logits(by_hand(tiny_af3, think), tiny_af3), rtol=0, atol=1e-4)
    plain = load(tiny_af3)
    assert type(model) is type(plain)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in plain.named_modules()
    }
    assert not model.training
    assert (logits(model, tiny_af3) - logits(plain, tiny_af3)).abs().max() > 1


def test_the_lora_is_what_stock_peft_makes_of_it(tiny_af3, think, tmp_path):
    only = tmp_path / "lora"
    shutil.copytree(think, only, ignore=shutil.ignore_patterns("non_lora*"))
    expected = logits(peft.PeftModel.from_pretrained(stock(tiny_af3), only).eval(), tiny_af3)
    torch.testing.assert_close(logits(load(tiny_af3, adapter=str(only)), tiny_af3), expected, rtol=0, atol=1e-4)


def test_layers_of_the_audio_encoder_with_like_names_are_left_alone(tiny_af3, think, tmp_path):
    folder = changed(think, tmp_path / "think", as_released)
    config = peft.LoraConfig.from_pretrained(folder)
    config.target_modules = {"q_proj", "v_proj", "down_proj"}
    config.init_lora_weights = False  # what is not loaded would be random
    config.save_pretrained(folder)
    merged, expected = load(tiny_af3, adapter=str(folder)), by_hand(tiny_af3, think)
    torch.testing.assert_close(logits(merged, tiny_af3), logits(expected, tiny_af3), rtol=0, atol=1e-4)


def other_layers(weights):
    return {name.replace("layers.1", "layers.9"): value for name, value in weights.items()}


def other_shapes(weights):
    return {name: torch.cat([value, value]) for name, value in weights.items()}


def not_finite(weights):
    return {name: value * float("nan") for name, value in weights.items()}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (other_layers, r"matches no module of the model \(model.language_model.layers.9"),
        (lambda weights: {"base_model.model.lm_head.weight": torch.zeros(1)}, "it has no LoRA weights"),
        (other_shapes, "cannot be merged"),
        (not_finite, "cannot be merged"),
    ],
    ids=["another model's", "no lora", "another size", "not finite"],
)
def test_an_adapter_that_does_not_fit_is_refused(tiny_af3, think, tmp_path, edit, says):
    with pytest.raises(ModelError, match=says):
        load(tiny_af3, adapter=str(changed(think, tmp_path / "think", edit)))


def test_no_weight_of_an_adapter_is_ignored(tiny_af3, think, tmp_path):
    folder = tmp_path / "think"
    shutil.copytree(think, folder)
    torch.save({"vision_tower.weight": torch.zeros(1)}, folder / "non_lora_trainables.bin")
    with pytest.raises(ModelError, match=r"1 of 1 weights in non_lora_trainables.bin are none .*vision_tower.weight"):
        load(tiny_af3, adapter=str(folder))


def test_an_adapter_that_is_not_there_or_no_lora(tiny_af3, think, tmp_path):
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load(tiny_af3, adapter=str(tmp_path))
    peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="IA3; only LoRA can be merged"):
        load(tiny_af3, adapter=str(tmp_path))


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [("peft", {"adapter": "think"}, "adapter"), ("torchao.quantization", {"quantize": "int8"}, "quantize")],
)
def test_a_package_that_is_missing_is_named_with_its_extra(tiny_af3, think, monkeypatch, module, options, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ModelError, match=rf"pip install 'af3pipe\[{extra}\]'"):
        load(tiny_af3, **options)


def test_the_language_model_is_quantised_and_nothing_else(tiny_af3):
    plain, small = load(tiny_af3), load(tiny_af3, quantize="int8")
    linear = {
        name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear) and "language" in name
    }
    assert len(linear) == 2 * 7
    for name, module in small.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (type(module.weight) is not torch.nn.Parameter) == (name in linear), name
    assert small.lm_head.weight.dtype == torch.float32
    untouched = {name: value for name, value in small.state_dict().items() if name.rpartition(".")[0] not in linear}
    assert len(untouched) > 40
    for name, value in untouched.items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=0)


def test_quantised_weights_are_those_with_the_adapter(tiny_af3, think):
    """Within half a step of the 127 that a row's largest weight is cut into."""
    merged = load(tiny_af3, adapter=str(think)).state_dict()
    small = load(tiny_af3, adapter=str(think), quantize="int8")
    for name, value in small.model.language_model.named_modules():
        if isinstance(value, torch.nn.Linear):
            exact = merged[f"model.language_model.{name}.weight"]
            step = exact.abs().amax(1, keepdim=True) / 127
            assert ((value.weight.dequantize() - exact).abs() <= 0.51 * step).all(), name


def test_a_quantised_model_says_what_the_exact_one_says(demo_oracle):
    small = Oracle(
        demo_oracle.checkpoint,
        load_model(demo_oracle.checkpoint, CPU, torch.float32, quantize="int8"),
        demo_oracle.processor,
    )
    task = resolve(caption(max_new_tokens=24), "AudioFlamingo3")
    for name in CLIPS:
        samples = clip(name)
        assert small.ask(samples, task).text == demo_oracle.ask(samples, task).text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention": "magic"}, "attention 'magic'"),
        ({"quantize": "fp8"}, "quantize is 'fp8', but device 'cpu'"),
        ({"quantize": "int3"}, "choose from none, int8, fp8"),
    ],
)
def test_what_cannot_be_done_here_is_told(tiny_af3, options, says):
    with pytest.raises(ModelError, match=says):
        load(tiny_af3, **options)


def test_attention_is_the_audio_encoders(tiny_af3, tiny_mf):
    for path in (tiny_af3, tiny_mf):
        for attention in ("sdpa", "eager"):
            core = load(path, attention=attention).model
            assert core.audio_tower.config._attn_implementation == attention
            assert core.language_model.config._attn_implementation == "sdpa"


def test_other_weights_have_another_revision(tiny_af3, think, tmp_path):
    checkpoint = open_checkpoint(str(tiny_af3))
    other = changed(think, tmp_path / "think", lambda weights: {name: 2 * value for name, value in weights.items()})
    found = adapter_revision(str(think))
    assert found.startswith("sha256:")
    assert len(found) == len("sha256:") + 12
    revisions = {
        model_revision(checkpoint),
        model_revision(checkpoint, None, "int8"),
        model_revision(checkpoint, str(think)),
        model_revision(checkpoint, str(other)),
        model_revision(checkpoint, str(think), "int8"),
    }
    assert len(revisions) == 5
    assert model_revision(checkpoint) == checkpoint.revision
    assert model_revision(checkpoint, str(think), "int8") == f"{checkpoint.revision}+{found}+int8"
    with pytest.raises(ModelError, match=r"it has no adapter_config\.json"):
        model_revision(checkpoint, str(tiny_af3))
