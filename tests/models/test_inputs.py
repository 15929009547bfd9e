"""The arithmetic and the prompts against the real processors: what they would do, without their doing it."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from af3pipe.models.inputs import Inputs, generation_config
from af3pipe.schemas import Decoding, Rejected, Task, Turn
from tests.models.conftest import sounds

LENGTHS = st.one_of(st.integers(321, 2000), st.integers(321, 1_500_000), st.integers(479_000, 481_500))
NOISE = sounds(95)


@pytest.fixture(scope="module", params=["af3_oracle", "mf_oracle"])
def oracle(request):
    return request.getfixturevalue(request.param)


def test_audio_tokens_and_prompts_are_the_processors_own(oracle):
    checkpoint, inputs = oracle.checkpoint, Inputs(oracle.checkpoint, oracle.processor)

    @settings(max_examples=12, database=None)
    @given(LENGTHS, st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20))
    @example(321, "x")
    @example(480_001, "Describe the audio in detail.")
    @example(480_321, "äöü 音楽 🎵")
    def holds(n, prompt):
        turns = (Turn(prompt),)
        stock = oracle.inputs([NOISE[:n]], turns)
        audio_tokens = checkpoint.audio_tokens(n)
        assert audio_tokens == int((stock["input_ids"] == inputs.audio_token_id).sum())
        ours = inputs.prompt(turns, [], [audio_tokens])
        assert inputs.ids(ours).tolist() == stock["input_ids"][0].tolist()
        assert ours[ours < 0].tolist() == [-1 - place for place in range(audio_tokens)]
        windows = inputs.windows(NOISE[:n])
        assert len(stock["input_features"]) - len(windows) == (checkpoint.window_tokens(n)[-1] == 0)
        for window, features, mask in zip(
            windows, stock["input_features"], stock["input_features_mask"], strict=False
        ):
            assert (window.frames, window.full_frames) == (mask.sum(), len(mask))
            torch.testing.assert_close(window.features, features[:, : window.features.shape[1]])
            assert window.features.shape[1] == min(window.frames + 8, window.full_frames)

    holds()


def test_min_samples_is_the_fewest_that_give_a_token(oracle):
    checkpoint = oracle.checkpoint
    fewest = checkpoint.limits.min_samples
    assert (checkpoint.audio_tokens(fewest - 1), checkpoint.audio_tokens(fewest)) == (0, 1)
    assert (
        int(
            (oracle.inputs([NOISE[: fewest - 1]], (Turn("x"),))["input_ids"] == oracle.processor.audio_token_id).sum()
        )
        == 0
    )


def test_music_flamingo_has_its_audio_in_brackets(mf_oracle):
    processor = mf_oracle.processor
    inputs = Inputs(mf_oracle.checkpoint, processor)
    ids = inputs.ids(inputs.prompt((Turn("x"),), [], [2])).tolist()
    begin = ids.index(processor.audio_bos_token_id)
    assert ids[begin : begin + 4] == [
        processor.audio_bos_token_id,
        processor.audio_token_id,
        processor.audio_token_id,
        processor.audio_eos_token_id,
    ]


def test_a_prompt_with_a_placeholder_is_rejected(oracle):
    with pytest.raises(Rejected, match="audio placeholder '<sound>'"):
        Inputs(oracle.checkpoint, oracle.processor).prompt((Turn("Is <sound> a word?"),), [], [5])


def test_a_conversation_is_as_the_processor_writes_it(oracle):
    inputs = Inputs(oracle.checkpoint, oracle.processor)
    turns, replies = (Turn("What is heard?"), Turn("How often?"), Turn("")), ["A beep.", "äh, twice\n"]
    stock = oracle.inputs([NOISE[:48_000]], turns, replies)
    assert inputs.ids(inputs.prompt(turns, replies, [75])).tolist() == stock["input_ids"][0].tolist()


def test_audio_alone_and_text_alone_are_as_the_processor_writes_them(oracle):
    inputs = Inputs(oracle.checkpoint, oracle.processor)
    stock = oracle.inputs([NOISE[:48_000]], (Turn(""),))["input_ids"][0].tolist()
    assert inputs.ids(inputs.prompt((Turn(""),), [], [75])).tolist() == stock
    assert stock.count(inputs.audio_token_id) == 75
    stock = oracle.inputs([], (Turn("Which is louder?", ()),))["input_ids"][0].tolist()
    assert inputs.prompt((Turn("Which is louder?", ()),), [], []).tolist() == stock


def test_several_audios_stand_where_their_turns_hear_them(oracle):
    inputs = Inputs(oracle.checkpoint, oracle.processor)

    def heard(*turns):
        prompt = inputs.prompt(turns, ["yes"] * (len(turns) - 1), [3, 2])
        return [-1 - token for token in prompt.tolist() if token < 0]

    assert heard(Turn("Which?")) == [0, 1, 2, 3, 4]
    assert heard(Turn("Which?", (1, 0))) == [3, 4, 0, 1, 2]
    assert heard(Turn("This?", (0,)), Turn("Or this?", (1,))) == [0, 1, 2, 3, 4]
    assert heard(Turn("This?", (1,)), Turn("Again?")) == [3, 4]
    assert heard(Turn("This?", (1,)), Turn("And?", (0, 1))) == [3, 4, 0, 1, 2, 3, 4]
    with pytest.raises(Rejected, match=r"'This\?' refers to audio 2, but the request has 2"):
        heard(Turn("This?", (2,)))


def test_a_template_without_room_for_the_audio_is_rejected(oracle):
    class Deaf:
        def __getattr__(self, name):
            return getattr(oracle.processor, name)

        def apply_chat_template(self, messages, **kwargs):
            return oracle.processor.apply_chat_template(messages, **kwargs).replace("<sound>", "")

    with pytest.raises(Rejected, match="writes 0 audio placeholders for 1"):
        Inputs(oracle.checkpoint, Deaf()).prompt((Turn("x"),), [], [5])


def test_a_reply_counts_its_tokens_and_loses_what_follows_a_stop_string(demo_oracle):
    inputs = Inputs(demo_oracle.checkpoint, demo_oracle.processor)
    task = Task("x", decoding=Decoding(max_new_tokens=9, stop=("b",)))
    tokens = inputs.processor.tokenizer("a b c")["input_ids"]
    reply = inputs.reply(tokens, np.array([-1, -2, 5]), task, "stop")
    assert (reply.text, reply.tokens, reply.finish_reason) == ("a", tuple(tokens), "stop")
    assert (reply.audio_tokens, reply.prompt_tokens, reply.new_tokens) == (2, 3, len(tokens))
    assert inputs.said(reply) == "a b c"


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
    silent, loud = inputs.windows(np.concatenate([np.zeros(480_000, np.float32), NOISE[:48_000]]))
    assert [(w.place, w.tokens, w.frames) for w in (silent, loud)] == [(0, 750, 3000), (1, 75, 300)]
    assert silent.features.std() < 1e-6 < loud.features[:, :300].std()
