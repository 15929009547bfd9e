"""The arithmetic and the prompts against the real processors: what they would do, without their doing it."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from af3pipe.models.inputs import Inputs, generation_config
from af3pipe.schemas import Decoding, Rejected, Task
from tests.models.conftest import sounds

LENGTHS = st.one_of(st.integers(321, 2000), st.integers(321, 1_500_000), st.integers(479_000, 481_500))
NOISE = sounds(95)


@pytest.fixture(scope="module", params=["af3_oracle", "mf_oracle"])
def oracle(request):
    return request.getfixturevalue(request.param)


def test_audio_tokens_and_prompts_are_the_processors_own(oracle):
    checkpoint, inputs = oracle.checkpoint, Inputs(oracle.checkpoint, oracle.processor)

    @settings(max_examples=12, deadline=None, database=None)
    @given(LENGTHS, st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20))
    @example(321, "x")
    @example(480_001, "Describe the audio in detail.")
    @example(480_321, "äöü 音楽 🎵")
    def holds(n, prompt):
        stock = oracle.inputs(NOISE[:n], prompt)
        assert checkpoint.audio_tokens(n) == int((stock["input_ids"] == inputs.audio_token_id).sum())
        assert torch.equal(inputs.prompt_ids(prompt, checkpoint.audio_tokens(n)), stock["input_ids"][0])
        windows = inputs.windows(NOISE[:n])
        kept = len(windows.tokens)
        assert len(stock["input_features"]) - kept == (checkpoint.window_tokens(n)[-1] == 0)
        torch.testing.assert_close(windows.features, stock["input_features"][:kept])
        assert torch.equal(windows.mask, stock["input_features_mask"][:kept])

    holds()


def test_min_samples_is_the_fewest_that_give_a_token(oracle):
    checkpoint = oracle.checkpoint
    fewest = checkpoint.limits.min_samples
    assert (checkpoint.audio_tokens(fewest - 1), checkpoint.audio_tokens(fewest)) == (0, 1)
    assert int((oracle.inputs(NOISE[: fewest - 1], "x")["input_ids"] == oracle.processor.audio_token_id).sum()) == 0


def test_music_flamingo_has_its_audio_in_brackets(mf_oracle):
    processor = mf_oracle.processor
    ids = Inputs(mf_oracle.checkpoint, processor).prompt_ids("x", 2).tolist()
    begin = ids.index(processor.audio_bos_token_id)
    assert ids[begin : begin + 4] == [
        processor.audio_bos_token_id,
        processor.audio_token_id,
        processor.audio_token_id,
        processor.audio_eos_token_id,
    ]


def test_a_prompt_with_a_placeholder_is_rejected(oracle):
    with pytest.raises(Rejected, match="audio placeholder '<sound>'"):
        Inputs(oracle.checkpoint, oracle.processor).prompt_ids("Is <sound> a word?", 5)


@pytest.mark.parametrize(
    ("tokens", "kept", "reason"),
    [
        ([7, 8, 9], [7, 8, 9], "length"),
        ([7, 8, 9, 10], [7, 8, 9], "length"),
        ([7, 2, 0, 0], [7, 2], "stop"),
        ([7, 8, 2, 0], [7, 8, 2], "stop"),
        ([7, 8, 9, 2], [7, 8, 9], "length"),
        ([0], [0], "stop"),
    ],
)
def test_a_reply_ends_at_its_end_or_at_its_limit(demo_oracle, tokens, kept, reason):
    inputs = Inputs(demo_oracle.checkpoint, demo_oracle.processor)
    task = Task("x", decoding=Decoding(max_new_tokens=3))
    reply = inputs.reply(tokens, torch.tensor([3, 3, 5]), task, demo_oracle.model.generation_config)
    assert (list(reply.tokens), reply.finish_reason) == (kept, reason)
    assert (reply.audio_tokens, reply.prompt_tokens, reply.new_tokens) == (2, 3, len(kept))


def test_nothing_that_decides_is_left_to_the_checkpoint(af3_oracle):
    released = af3_oracle.model.generation_config
    assert released.do_sample
    assert released.repetition_penalty == 1.05
    greedy = generation_config(Decoding(), released)
    assert (greedy.do_sample, greedy.repetition_penalty, greedy.num_beams) == (False, 1.0, 1)
    assert greedy.eos_token_id == released.eos_token_id
    decoding = Decoding(do_sample=True, temperature=0.3, min_new_tokens=3, stop=("x",))
    sampled = generation_config(decoding, released)
    assert not sampled.do_sample, "its draws would be torch's own"
    assert (sampled.min_new_tokens, sampled.stop_strings) == (3, ["x"])


def test_windows_hold_the_samples_in_order(af3_oracle):
    inputs = Inputs(af3_oracle.checkpoint, af3_oracle.processor)
    windows = inputs.windows(np.concatenate([np.zeros(480_000, np.float32), NOISE[:48_000]]))
    assert windows.tokens == (750, 75)
    assert windows.mask.sum(1).tolist() == [3000, 300]
    assert windows.features[0].std() < 1e-6 < windows.features[1, :, :300].std()
