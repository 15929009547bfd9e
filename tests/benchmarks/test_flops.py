"""The arithmetic of the floor, against what torch counts in the real modules."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AudioFlamingo3Encoder,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    AutoProcessor,
)

from af3pipe.models.family import open_checkpoint
from benchmarks import flops
from benchmarks.flops import Dims
from tests.checkpoints import tiny_audio_flamingo

# Eager attention, because the fused kernels of the CPU are not counted.
EAGER = {"attn_implementation": "eager"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tiny_audio_flamingo(tmp_path_factory.mktemp("checkpoints") / "af3")
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(path, **EAGER).eval()


@pytest.fixture(scope="module")
def demo():
    source = open_checkpoint("demo").source
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(source, dtype=torch.float32, **EAGER).eval()


@pytest.fixture(params=["tiny", "demo"])
def model(request):
    return request.getfixturevalue(request.param)


def counted(call):
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return counter


def test_encoder_and_projector_of_a_full_window(model):
    dims = Dims.of(model.config)
    features, mask = torch.randn(1, dims.mel_bins, 3000), torch.ones(1, 3000, dtype=torch.long)
    counter = counted(lambda: model.model.get_audio_features(features, mask))
    assert flops.window_frames(480_000) == [3000]
    expected = flops.encoder_flops(3000, dims) + flops.projector_flops(flops.audio_tokens(3000), dims)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("frames", [3, 99, 100, 101, 102, 503])
def test_encoder_of_a_cut_window(frames):
    # The stock encoder takes full windows only; one whose full window is this short is the same arithmetic.
    positions = flops.encoder_positions(frames)
    config = AudioFlamingo3EncoderConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        max_source_positions=positions,
    )
    config._attn_implementation = "eager"
    encoder = AudioFlamingo3Encoder(config).eval()
    found = []

    def run():
        mask = torch.ones(1, frames, dtype=torch.long)
        found.append(encoder(torch.randn(1, 128, frames), input_features_mask=mask).last_hidden_state)

    dims = Dims(128, 64, 96, 3, *[0] * 7)
    assert counted(run).get_total_flops() == flops.encoder_flops(frames, dims)
    assert found[0].shape[1] == flops.audio_tokens(frames)


@pytest.mark.parametrize("tokens", [1, 2, 77, 800])
def test_prefill(model, tokens):
    dims = Dims.of(model.config)
    ids = torch.full((1, tokens), 5)
    counter = counted(lambda: model(input_ids=ids, logits_to_keep=1))
    # Eager attention computes all pairs, and masks those of a token and a later one.
    masked = tokens * tokens - tokens * (tokens + 1) // 2
    in_vain = dims.layers * flops.attention_flops(masked, dims.heads * dims.head_dim)
    assert counter.get_total_flops() == flops.prefill_flops(tokens, dims) + in_vain


def test_filter_bank():
    extractor = AutoProcessor.from_pretrained(open_checkpoint("demo").source).feature_extractor
    sound = torch.randn(480_000).numpy()
    counter = counted(lambda: extractor(sound, sampling_rate=16_000, return_tensors="pt"))
    assert counter.get_total_flops() == flops.filterbank_flops(3000, extractor.feature_size, extractor.n_fft)


def test_weights_of_a_step(model):
    modules = (model.model.language_model.layers, model.model.language_model.norm, model.lm_head)
    entries = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert flops.step_weights(Dims.of(model.config)) == entries


@pytest.mark.parametrize("samples", [400, 640, 4_801, 479_999, 480_001, 480_640, 1_520_000])
def test_lengths_are_those_of_the_checkpoint(samples):
    tokens = [flops.audio_tokens(frames) for frames in flops.window_frames(samples)]
    assert tuple(tokens) == open_checkpoint("demo").window_tokens(samples)


def test_work_of_a_mix_is_the_sum_of_its_parts():
    dims = Dims.of(AudioFlamingo3ForConditionalGeneration.config_class())
    both = flops.least_work([16_000, 500_000], [40, 800], dims)
    alone = [flops.least_work([16_000], [40], dims), flops.least_work([500_000], [800], dims)]
    assert both == pytest.approx(tuple(map(sum, zip(*alone, strict=True))), rel=1e-12)
    # A last window without an audio token is not computed.
    assert flops.least_work([480_000 + 160], [1], dims) == flops.least_work([480_000], [1], dims)


def test_decoding_reads():
    assert flops.read_positions(10, 1) == 0
    assert flops.read_positions(10, 4) == 11 + 12 + 13
    assert flops.least_steps([5, 5, 5, 5], slots=2) == 8
    assert flops.least_steps([100, 2, 2], slots=2) == 99
    dims = Dims(*[0] * 4, width=4, heads=2, kv_heads=1, head_dim=2, ffn=8, layers=3, vocab=16)
    cache = 36 * 2 * 3 * 1 * 2
    assert flops.decode_bytes([10], [4], 2, dims, itemsize=2) == 2 * (3 * flops.step_weights(dims) + cache)
