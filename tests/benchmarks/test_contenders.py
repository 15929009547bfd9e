"""The contenders do the same work: what is measured is how, not what."""

import numpy as np
import pytest
import torch
from transformers import AudioFlamingo3Config, AudioFlamingo3EncoderConfig, Qwen2Config

from af3pipe.models import caption, resolve
from af3pipe.schemas import Request
from benchmarks import contenders
from benchmarks.engine import sound, spread


def requests(*asked, family="AudioFlamingo3"):
    rng = np.random.default_rng(0)
    task = resolve(caption(), family)
    return [
        Request(sound(seconds, rng), (task._replace(decoding=contenders.exactly(new_tokens)),))
        for seconds, new_tokens in asked
    ]


@pytest.fixture(scope="module")
def demo():
    return contenders.load("demo", "cpu", torch.float32)


def test_batches_give_the_tokens_of_alone(demo, monkeypatch):
    monkeypatch.setattr(contenders, "BATCH_SIZE", 2)
    lengths = [(0.4, 7), (33.0, 3), (2.0, 5)]  # more than one batch
    asked = requests(*lengths)
    expected = contenders.alone(demo, asked)
    assert [len(reply) for reply in expected] == [new_tokens for _, new_tokens in lengths]
    assert contenders.batches(demo, asked) == expected


def test_random_weights_answer(demo):
    # A vocabulary larger than the tokenizer's, as that of the released shape is.
    config = AudioFlamingo3Config(
        audio_config=AudioFlamingo3EncoderConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        ),
        text_config=Qwen2Config(
            vocab_size=5000,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
    )
    made = contenders.random_model(config, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.bfloat16}
    assert made.model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    replies = contenders.alone(made, requests((1.0, 9), (2.0, 9)))
    assert [len(reply) for reply in replies] == [9, 9]
    assert max(max(reply) for reply in replies) >= len(made.processor.tokenizer)


def test_the_released_shape_has_8_billion_weights():
    with torch.device("meta"):
        model = contenders.AudioFlamingo3ForConditionalGeneration(contenders.released_shape())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(8.27e9, rel=0.01)


def test_sounds_differ_and_are_fixed_by_the_seed():
    one, other = (sound(1.5, np.random.default_rng(seed)) for seed in (1, 2))
    assert len(one) == 24_000
    assert one.dtype == np.float32
    assert 0.01 < np.abs(one).max() < 1
    assert not np.array_equal(one, other)
    assert np.array_equal(one, sound(1.5, np.random.default_rng(1)))


def test_spread_takes_replies_of_all_lengths():
    asked = requests(*((0.1, n) for n in (9, 1, 5, 3, 8, 2, 7, 4, 6)))
    chosen = spread(asked, 3)
    assert sorted(contenders.asked_tokens(asked[index]) for index in chosen) == [2, 5, 8]
    assert chosen == sorted(chosen)
    assert spread(asked, 50) == list(range(9))
