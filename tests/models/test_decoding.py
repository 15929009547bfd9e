"""Many prompts at once against stock `generate`, one at a time, token for token."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from af3pipe.models import ModelError, caption, resolve
from af3pipe.models.decoding import Chooser, _draw, cut_at_stop
from af3pipe.models.inputs import Inputs, eos_token_ids, generation_config
from af3pipe.schemas import Decoding, Turn
from tests.models.conftest import clip

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["speech", "music", "noise"]},
            "voices": {"type": "integer", "minimum": 0, "maximum": 9},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2},
        },
        "required": ["kind", "voices", "tags"],
        "additionalProperties": False,
    }
)
ODD = ("siren", "siren wailing", 'she said "no\\yes"', "two\nlines", "zwölf 🎵", "a/b [c] (d)*", "<sound>")


def chooser(oracle, vocab_size=None):
    ends = eos_token_ids(oracle.model.generation_config)
    size = vocab_size or oracle.model.config.get_text_config().vocab_size
    return Chooser(oracle.processor.tokenizer, ends, size)


def read(oracle, i):
    """A conversation of its own for every number; no audio, which is quick."""
    inputs = Inputs(oracle.checkpoint, oracle.processor)
    ids = inputs.ids(inputs.prompt((Turn(f"Describe the {'loud ' * i}sound."),), [], [20 + i]))
    return {"input_ids": torch.from_numpy(ids)[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def hear(oracle, name):
    """A clip of the demo's, which it describes."""
    return oracle.inputs([clip(name)], resolve(caption(), "AudioFlamingo3").turns)


@torch.inference_mode()
def alone(oracle, inputs, decoding, seed=0):
    """The new tokens of stock `generate`."""
    config = generation_config(decoding, oracle.model.generation_config)
    arguments = chooser(oracle).generate_arguments(decoding, seed)
    output = oracle.model.generate(**inputs, generation_config=config, **arguments)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@torch.inference_mode()
def together(oracle, cases, pad=0):
    """Choices for (inputs, decoding, seed): one `Chooser.next` a step, over logits that stock gives each alone.

    Args:
        pad: Rows that the head has beyond the tokenizer's tokens, with logits above all others.
    """
    size = oracle.model.config.get_text_config().vocab_size
    ours = chooser(oracle, size + pad)
    choices, outputs = [], []
    for inputs, decoding, seed in cases:
        choices.append(ours.begin(decoding, seed, inputs["input_ids"][0].tolist()))
        outputs.append(oracle.model(**inputs, use_cache=True))
    while live := [row for row, choice in enumerate(choices) if choice.finish_reason is None]:
        logits = torch.stack([outputs[row].logits[0, -1] for row in live])
        logits = torch.nn.functional.pad(logits, (0, pad), value=1e4)
        tokens = ours.next(logits, [choices[row] for row in live])
        for row, token in zip(live, tokens, strict=True):
            cache = outputs[row].past_key_values
            outputs[row] = oracle.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    return choices


def assert_as_stock(oracle, cases):
    """All choices, decoded together, are what stock gives each of them; returns them."""
    choices = together(oracle, cases)
    for choice, (inputs, decoding, seed) in zip(choices, cases, strict=True):
        assert choice.tokens == alone(oracle, inputs, decoding, seed), decoding
        assert choice.error is None
    return choices


def text(oracle, choice):
    return oracle.processor.tokenizer.decode(choice.tokens, skip_special_tokens=True)


@pytest.fixture(params=["af3_oracle", "mf_oracle"])
def oracle(request):
    return request.getfixturevalue(request.param)


# -- against stock generate ------------------------------------------------------------------------------------------


def test_all_kinds_of_decoding_in_one_batch(oracle):
    kinds = [
        Decoding(),
        Decoding(repetition_penalty=1.3),
        Decoding(repetition_penalty=0.7, min_new_tokens=4),
        Decoding(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
        Decoding(do_sample=True, temperature=2.5, top_k=0, seed=4),
        Decoding(do_sample=True, top_k=0, top_p=0.5),
        Decoding(do_sample=True, temperature=1.4, top_k=7, top_p=0.95, seed=-1),
        Decoding(one_of=("speech", "music", "noise")),
        Decoding(do_sample=True, temperature=3.0, one_of=ODD, repetition_penalty=1.2),
        Decoding(do_sample=True, json_schema=SCHEMA),
        Decoding(stop=("e", "th")),
    ]
    cases = [(read(oracle, i), decoding._replace(max_new_tokens=8 + i % 5), i) for i, decoding in enumerate(kinds)]
    choices = assert_as_stock(oracle, cases)
    assert len({tuple(choice.tokens) for choice in choices}) == len(cases), "all say the same"


def test_greedy_ends_at_the_end_or_at_the_limit(demo_oracle):
    cases = [(read(demo_oracle, 0), Decoding(max_new_tokens=limit), 0) for limit in (3, 30)]
    cut, whole = assert_as_stock(demo_oracle, cases)
    assert (cut.finish_reason, whole.finish_reason) == ("length", "stop")
    assert whole.tokens[:3] == cut.tokens
    exactly = len(whole.tokens)
    for limit, reason in [(exactly, "stop"), (exactly - 1, "length")]:
        (choice,) = together(demo_oracle, [(read(demo_oracle, 0), Decoding(max_new_tokens=limit), 0)])
        assert (len(choice.tokens), choice.finish_reason) == (limit, reason)


def test_a_penalty_sees_the_prompt(demo_oracle):
    """Of prompt and reply: with an empty prompt, the same logits give another token."""
    ours, logits = chooser(demo_oracle), torch.zeros(1, 604)
    logits[0, 50], logits[0, 60] = 1.0, 0.9
    for prompt, token in [([7, 50], 60), ([7, 8], 50)]:
        choice = ours.begin(Decoding(repetition_penalty=1.5), 0, prompt)
        assert ours.next(logits, [choice]) == [token]
        assert ours.next(logits, [choice]) == [60 if token == 50 else 50]


def test_min_new_tokens_holds_back_every_end(demo_oracle):
    (short,) = together(demo_oracle, [(read(demo_oracle, 0), Decoding(), 0)])
    more = len(short.tokens) + 5
    cases = [(read(demo_oracle, 0), Decoding(min_new_tokens=n, max_new_tokens=30), 0) for n in (more, 1)]
    longer, same = assert_as_stock(demo_oracle, cases)
    assert len(longer.tokens) >= more
    assert same.tokens == short.tokens
    assert not {0, 2} & set(longer.tokens[: more - 1])


def test_stop_strings(demo_oracle):
    (whole,) = together(demo_oracle, [(read(demo_oracle, 0), Decoding(), 0)])
    assert text(demo_oracle, whole) == 'A voice says "nine".'
    sets = [(" say",), ("ice", "zz"), ("zzz",), ('s "ni',), ("a text longer than the reply " * 3, ' "')]
    cases = [(read(demo_oracle, 0), Decoding(stop=stop), 0) for stop in sets]
    choices = assert_as_stock(demo_oracle, cases)
    assert [choice.finish_reason for choice in choices] == ["stop"] * 5
    cut = [cut_at_stop(text(demo_oracle, choice), stop) for choice, stop in zip(choices, sets, strict=True)]
    assert cut == ["A voice", "A vo", 'A voice says "nine".', "A voice say", "A voice says"]
    # At the limit, too, it is the string that ended it.
    limit = Decoding(stop=(" say",), max_new_tokens=len(choices[0].tokens))
    (choice,) = assert_as_stock(demo_oracle, [(read(demo_oracle, 0), limit, 0)])
    assert choice.finish_reason == "stop"


def test_a_stop_string_may_begin_in_the_prompt(demo_oracle):
    """As in stock: the prompt's end and the reply's beginning are one text."""
    tokenizer = demo_oracle.processor.tokenizer
    ours = chooser(demo_oracle)
    before, after = (tokenizer(part)["input_ids"] for part in ("the sound", "sir"))
    logits = torch.nn.functional.one_hot(torch.tensor(after[:1]), 604).float()
    reasons = []
    for prompt in (before, before[:-1], []):
        choice = ours.begin(Decoding(stop=("sound" + tokenizer.decode(after[:1]),)), 0, prompt)
        ours.next(logits, [choice])
        reasons.append(choice.finish_reason)
    assert reasons == ["stop", None, None]


def test_what_may_be_drawn_is_what_stock_could_draw(oracle):
    """The processors for `generate` against those that it makes itself when it samples."""
    inputs, released = read(oracle, 1), oracle.model.generation_config
    with torch.inference_mode():
        logits = oracle.model(**inputs).logits[:, -1].float()
    for temperature, top_k, top_p in [(0.7, 20, 0.8), (1.0, 0, 0.6), (2.0, 5, 1.0), (1.0, 50, 1.0)]:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        config = GenerationConfig(
            max_new_tokens=1,
            repetition_penalty=1.0,
            eos_token_id=released.eos_token_id,
            pad_token_id=released.pad_token_id,
            output_scores=True,
            return_dict_in_generate=True,
            **sampling,
        )
        stock = oracle.model.generate(**inputs, generation_config=config).scores[0]
        *warpers, last = chooser(oracle).generate_arguments(Decoding(**sampling), 0)["logits_processor"]
        scores = logits
        for warper in warpers:
            scores = warper(None, scores)
        torch.testing.assert_close(scores, stock)
        assert torch.isfinite(stock[0, last(None, scores).argmax()])


# -- constraints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["af3_oracle", "demo_oracle"])
def test_constraints_are_kept(request, name):
    oracle = request.getfixturevalue(name)
    hot = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    cases = [(read(oracle, i), Decoding(one_of=ODD, seed=i, **(hot if i else {})), i) for i in range(5)]
    cases += [(read(oracle, i), Decoding(json_schema=SCHEMA, seed=i, **(hot if i else {})), i) for i in range(3)]
    choices = assert_as_stock(oracle, cases)
    assert {choice.finish_reason for choice in choices} == {"stop"}
    texts = [text(oracle, choice) for choice in choices]
    assert set(texts[:5]) <= set(ODD)
    assert len(set(texts[:5])) > 2
    for reply in map(json.loads, texts[5:]):
        assert list(reply) == ["kind", "voices", "tags"]
        assert reply["kind"] in ("speech", "music", "noise")
        assert reply["voices"] in range(10)
        assert 1 <= len(reply["tags"]) <= 2
        assert all(len(tag) <= 6 for tag in reply["tags"])


def test_a_constrained_model_still_hears(demo_oracle):
    sirens = ("A dog barks.", "A siren wailing up and down.", "Steady white noise.")
    heard = {"siren": sirens[1], "white_noise": sirens[2]}
    choices = assert_as_stock(demo_oracle, [(hear(demo_oracle, name), Decoding(one_of=sirens), 0) for name in heard])
    assert [text(demo_oracle, choice) for choice in choices] == list(heard.values())


def test_json_is_written_as_python_writes_it(demo_oracle):
    """No model can fill its limit with spaces and line breaks."""
    (choice,) = together(demo_oracle, [(read(demo_oracle, 0), Decoding(json_schema=SCHEMA), 0)])
    reply = text(demo_oracle, choice)
    assert reply == json.dumps(json.loads(reply), ensure_ascii=False)


def test_a_constrained_reply_can_be_cut(demo_oracle):
    decoding = Decoding(json_schema=SCHEMA, max_new_tokens=5)
    (choice,) = assert_as_stock(demo_oracle, [(read(demo_oracle, 0), decoding, 0)])
    assert (len(choice.tokens), choice.finish_reason) == (5, "length")


def test_a_head_larger_than_the_vocabulary(demo_oracle):
    """The rows beyond have no text: no constraint lets them through, whatever their logits."""
    cases = [(read(demo_oracle, 0), Decoding(one_of=ODD), 0), (read(demo_oracle, 0), Decoding(json_schema=SCHEMA), 0)]
    plain = together(demo_oracle, cases)
    for pad in (4, 100):
        assert [choice.tokens for choice in together(demo_oracle, cases, pad=pad)] == [c.tokens for c in plain]


def test_every_end_may_end_a_constrained_reply(demo_oracle):
    """The model's favourite of several, of which the library knows one."""
    for favourite in (0, 2):
        ours = chooser(demo_oracle)
        choice = ours.begin(Decoding(one_of=("a",)), 0, [7])
        logits = torch.zeros(1, 604)
        logits[0, favourite] = 1.0
        assert ours.next(logits, [choice])[0] not in (0, 2)
        assert (ours.next(logits, [choice]), choice.finish_reason) == ([favourite], "stop")


def test_a_constraint_that_breaks_ends_one_reply_only(demo_oracle):
    ours = chooser(demo_oracle)
    broken, sound = (ours.begin(Decoding(one_of=ODD), 0, [7]) for _ in range(2))
    assert not broken._matcher.consume_token(99)
    ours.next(torch.rand(2, 604), [broken, sound])
    assert broken.finish_reason == "stop"
    assert "constraint cannot be followed after 0 tokens" in broken.error.detail
    assert (sound.finish_reason, sound.error) == (None, None)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"json_schema": "{"}, "json_schema '{' cannot be used.*EOF"),
        ({"json_schema": '{"type": "strin"}'}, "Invalid type: strin"),
        ({"json_schema": '{"type": "string", "pattern": "(?=a)"}'}, "regex parse error"),
        ({"json_schema": '{"if": {}}'}, "Unimplemented keys"),
        ({"json_schema": "{}", "one_of": ("a",)}, "two constraints"),
        ({"one_of": ("a",), "min_new_tokens": 3}, "min_new_tokens cannot"),
        ({"stop": ("a", "")}, "stop string is empty"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"do_sample": True, "top_p": -0.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_cannot_be_followed_is_refused_at_once(demo_oracle, asked, said):
    ours = chooser(demo_oracle)
    for begin in (lambda d: ours.begin(d, 0, [7]), lambda d: ours.generate_arguments(d, 0)):
        with pytest.raises(ModelError, match=said):
            begin(Decoding(**asked))


# -- draws -----------------------------------------------------------------------------------------------------------

DECODINGS = st.fixed_dictionaries(
    {
        "do_sample": st.booleans(),
        "temperature": st.sampled_from([0.5, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 5, 50]),
        "top_p": st.sampled_from([0.3, 0.9, 1.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.0, 1.2]),
        "seed": st.integers(-5, 5),
        "stop": st.sampled_from([(), ("e",), ("th", "in")]),
    },
    optional={"max_new_tokens": st.just(3)},
).flatmap(
    lambda fixed: st.sampled_from([{}, {"min_new_tokens": 3}, {"one_of": ODD}]).map(
        lambda more: Decoding(**fixed, **more)
    )
)
CASES = st.lists(
    st.tuples(DECODINGS, st.integers(0, 3), st.lists(st.integers(0, 603), min_size=1, max_size=30)),
    min_size=1,
    max_size=8,
)


def played(ours, cases, order, logits):
    """Tokens of each case after four steps of made-up logits, decoded together in this order."""
    choices = {row: ours.begin(*cases[row]) for row in order}
    for step in logits:
        live = [row for row in order if choices[row].finish_reason is None]
        if live:
            ours.next(step[live], [choices[row] for row in live])
    return {row: (choices[row].tokens, choices[row].finish_reason) for row in order}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_depends_on_the_others(demo_oracle, dtype):
    ours = chooser(demo_oracle)

    @settings(max_examples=25, database=None)
    @given(CASES, st.randoms(use_true_random=False), st.integers(0, 1000))
    def holds(cases, random, seed):
        logits = torch.randn(4, len(cases), 604, generator=torch.Generator().manual_seed(seed)).mul(4).to(dtype)
        order = list(range(len(cases)))
        in_order = played(ours, cases, order, logits)
        random.shuffle(order)
        assert played(ours, cases, order, logits) == in_order
        for row in order:
            assert played(ours, cases, [row], logits)[row] == in_order[row]

    holds()


def test_seeds_decide_the_draws(demo_oracle):
    ours, logits = chooser(demo_oracle), torch.zeros(12, 604)
    pairs = [(a, b) for a in (0, 1, -1) for b in (0, 1, 7)]

    def draws(pair):
        choice = ours.begin(Decoding(do_sample=True, top_k=0, seed=pair[0], max_new_tokens=99), pair[1], [7])
        return [ours.next(step[None], [choice])[0] for step in logits]

    assert len({tuple(draws(pair)) for pair in pairs}) == len(pairs)
    assert draws(pairs[1]) == draws(pairs[1])


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=9), st.integers(0, 8))
@settings(database=None)
def test_draws_follow_the_probabilities(logits, masked):
    """Of numbers spread evenly, each token gets its share, and what is masked none."""
    scores = torch.tensor(logits)
    if len(logits) > 1:
        scores[masked % len(logits)] = -torch.inf
    n = 2000
    drawn = _draw(scores.expand(n, -1), [(i + 0.5) / n for i in range(n)])
    counts = torch.bincount(drawn, minlength=len(logits))
    torch.testing.assert_close(counts.double(), n * scores.double().softmax(-1), atol=1.0, rtol=0)
    assert not counts[scores == -torch.inf].any()


def test_draws_at_the_ends_of_the_range():
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert _draw(scores, [0.0]).tolist() == [1]
    assert _draw(scores, [float(np.nextafter(1.0, 0.0))]).tolist() == [2]
    assert _draw(scores * torch.nan, [0.5]).tolist() == [3], "an index past the end takes a GPU down"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_chooses_the_same(demo_oracle):
    ours = chooser(demo_oracle)
    kinds = [
        Decoding(),
        Decoding(repetition_penalty=1.3, stop=("th",)),
        Decoding(do_sample=True, top_p=0.8),
        Decoding(do_sample=True, top_k=0, min_new_tokens=4),
        Decoding(do_sample=True, one_of=ODD),
        Decoding(json_schema=SCHEMA),
    ]
    cases = [(decoding, row, [7, 8, 9]) for row, decoding in enumerate(kinds)]
    logits = torch.randn(20, len(cases), 604, generator=torch.Generator().manual_seed(0)).mul(4)
    order = range(len(cases))
    assert played(ours, cases, order, logits.cuda()) == played(ours, cases, order, logits)


# -- stop strings in text --------------------------------------------------------------------------------------------


@given(st.text("ab.", max_size=12), st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3))
def test_cut_at_stop(text, stop):
    cut = cut_at_stop(text, stop)
    assert text.startswith(cut)
    assert not any(each in cut for each in stop)
    rest = text[len(cut) :]
    assert not rest or any(rest.startswith(each) for each in stop)
