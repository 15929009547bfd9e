"""What the engine promises beside the right answers: nobody waits for ever, and each request fails alone."""

import gc
import sys
import threading
import traceback
import weakref

import numpy as np
import pytest
import torch

from af3pipe.models import (
    EngineFailed,
    EngineOptions,
    ModelError,
    acquire_engine,
    caption,
    open_engine,
    release_engine,
    resolve,
    transcript,
)
from af3pipe.models.encoder import AudioEncoder
from af3pipe.models.slots import Slots
from af3pipe.schemas import Decoding, Reason, Rejected, Request, Stage, Task, Turn
from tests.models.conftest import clip, somebody_waits_for, sounds
from tests.waiting import wait_until

CAPTION = resolve(caption(max_new_tokens=6), "AudioFlamingo3")
LONG = CAPTION._replace(decoding=Decoding(max_new_tokens=2000, min_new_tokens=2000))


def poison_steps(monkeypatch, is_poisoned, error):
    """Makes a step raise whenever one of its slots is at a poisoned position; all positions asked for are kept."""
    step, asked = Slots.step, []

    def step_or_raise(slots, first, tokens, positions):
        asked.append(positions.tolist())
        if any(map(is_poisoned, asked[-1])):
            raise error()
        return step(slots, first, tokens, positions)

    monkeypatch.setattr(Slots, "step", step_or_raise)
    return asked


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")


def answers(engine, requests):
    return [future.result(timeout=120) for future in [engine.submit(request) for request in requests]]


def test_one_poisoned_request_fails_alone(open_model, tiny_af3, af3_oracle, monkeypatch):
    engine = open_model(tiny_af3)
    requests = [Request(sounds(0.5 + i / 4, seed=i), (CAPTION,)) for i in range(8)]
    expected = [af3_oracle.ask(request.samples, CAPTION) for request in requests]
    assert len({reply.prompt_tokens for reply in expected}) == 8
    poison_steps(monkeypatch, lambda at: at == expected[5].prompt_tokens, lambda: ZeroDivisionError("poisoned"))
    futures = [engine.submit(request) for request in requests]
    for i, future in enumerate(futures):
        # Another one may be at that position later; then it fails there and nowhere else.
        if (
            expected[i].prompt_tokens
            <= expected[5].prompt_tokens
            < expected[i].prompt_tokens + expected[i].new_tokens - 1
        ):
            with pytest.raises(ZeroDivisionError, match="poisoned"):
                future.result(timeout=60)
        else:
            assert future.result(timeout=60) == [expected[i]]
    assert i > 5


def test_what_is_no_number_stays_with_its_request(open_model, tiny_af3, af3_oracle):
    """Samples of 1e30 overflow the features; the next prompt in that slot is shorter than what they left there."""
    task = CAPTION._replace(decoding=Decoding(max_new_tokens=20))
    good = Request(sounds(1), (task,))
    engine = open_model(tiny_af3, slots=1)
    with pytest.raises(Rejected, match="scores are not finite") as caught:
        engine.submit(Request(sounds(5) * np.float32(1e30), (CAPTION,))).result(timeout=60)
    assert caught.value.reason is Reason.ENGINE_ERROR
    assert engine.submit(good).result(timeout=60) == [af3_oracle.ask(good.samples, task)]


@pytest.mark.parametrize("method", ["_pick", "_stopped"])
def test_who_is_chosen_for_beside_a_failing_one_gets_the_same_tokens(
    open_model, tiny_af3, af3_oracle, monkeypatch, method
):
    """What raises has drawn for everybody already: the others are chosen for again, with the same draws."""
    tasks = [
        CAPTION._replace(
            decoding=Decoding(max_new_tokens=8, min_new_tokens=8, do_sample=True, seed=i, repetition_penalty=1.1)
        )
        for i in range(4)
    ]
    requests = [Request(sounds(1 + i / 4, seed=i), (task,)) for i, task in enumerate(tasks)]
    expected = [af3_oracle.ask(request.samples, *request.tasks) for request in requests]
    engine = open_model(tiny_af3)
    original = getattr(engine._chooser, method)

    def raise_for_one(*arguments):
        result = original(*arguments)
        choices = arguments[1] if method == "_pick" else arguments[0]
        if any(choice.decoding.seed == 2 and len(choice.tokens) == 3 for choice in choices):
            raise ZeroDivisionError
        return result

    monkeypatch.setattr(engine._chooser, method, raise_for_one)
    futures = [engine.submit(request) for request in requests]
    assert [futures[i].result(timeout=60) for i in (0, 1, 3)] == [[expected[i]] for i in (0, 1, 3)]
    assert isinstance(futures[2].exception(timeout=60), ZeroDivisionError)


def test_a_kept_error_keeps_no_memory(open_model, tiny_af3, monkeypatch):
    kept = []

    def fail(slots, *arguments):
        kept.append(weakref.ref(slots))
        raise ZeroDivisionError("poisoned")

    monkeypatch.setattr(Slots, "step", fail)
    engine = open_model(tiny_af3)
    error = engine.submit(Request(sounds(1), (CAPTION,))).exception(timeout=60)
    engine.close()
    gc.collect()
    assert kept[0]() is None
    if sys.version_info >= (3, 11):
        assert "in fail" in "".join(traceback.format_exception(error)), "but says where it comes from"


def test_bad_requests_in_a_batch_fail_alone_for_their_own_reasons(open_model, tiny_af3, af3_oracle):
    engine = open_model(tiny_af3)
    good = Request(sounds(1), (CAPTION, CAPTION._replace(prompt="What is it?")))
    bad = [
        (Request(sounds(0.02), (CAPTION,)), Stage.WINDOW, Reason.TOO_SHORT),
        (Request(sounds(0), (CAPTION,)), Stage.WINDOW, Reason.TOO_SHORT),
        (Request(np.zeros(600 * 16_000 + 1, np.float32), (CAPTION,)), Stage.WINDOW, Reason.TOO_LONG),
        (Request(np.full(16_000, np.nan, np.float32), (CAPTION,)), Stage.WINDOW, Reason.DECODE_ERROR),
        (Request(sounds(1), (CAPTION._replace(prompt="<sound>?"),)), Stage.GENERATE, Reason.ENGINE_ERROR),
    ]
    first, *futures, last = [engine.submit(r) for r in (good, *(request for request, _, _ in bad), good)]
    for future, (_, stage, reason) in zip(futures, bad, strict=True):
        with pytest.raises(Rejected) as caught:
            future.result(timeout=60)
        assert (caught.value.stage, caught.value.reason) == (stage, reason)
    assert first.result(timeout=60) == [af3_oracle.ask(good.samples, task) for task in good.tasks]
    assert last.result(timeout=60) == first.result()
    with pytest.raises(ValueError, match="no prompt"):
        engine.submit(Request(sounds(1), (Task("caption"),))).result(timeout=60)
    with pytest.raises(ValueError, match="has no tasks"):
        engine.submit(Request(sounds(1), ())).result(timeout=60)
    nothing_before = Task("answer", "So?", history=(*CAPTION.turns, Turn("What is it?")))
    unasked = engine.submit(Request(sounds(1), (CAPTION, nothing_before)))
    assert unasked.done(), "known before anything is worked on"
    with pytest.raises(ValueError, match=r"'What is it\?', which is not an earlier task"):
        unasked.result()


@pytest.mark.parametrize("method", ["step", "prefill"])
def test_out_of_memory_takes_less_remembers_it_and_names_the_numbers(
    open_model, tiny_af3, af3_oracle, monkeypatch, method
):
    """Whatever is computed for more than two slots at once, or for more than 300 tokens, does not fit."""
    original, sizes = getattr(Slots, method), []

    def at_most_two(slots, *arguments):
        pieces = arguments[0] if method == "prefill" else range(len(arguments[1]))
        longest = max((p.start + len(p.embeds) for p in pieces), default=0) if method == "prefill" else 0
        longest = longest or max(arguments[2])
        sizes.append(len(pieces))
        if len(pieces) > 2 or longest > 300:
            raise out_of_memory()
        return original(slots, *arguments)

    monkeypatch.setattr(Slots, method, at_most_two)
    engine = open_model(tiny_af3, slots=8)
    requests = [Request(sounds(1 + i / 10, seed=i), (CAPTION,)) for i in range(8)]
    expected = [[af3_oracle.ask(request.samples, CAPTION)] for request in requests]
    assert answers(engine, requests) == expected
    del sizes[:]
    assert answers(engine, requests) == expected
    assert max(sizes) <= 2, "the second round must not try again what did not fit"
    with pytest.raises(Rejected, match=r"no room for \d{3,} prompt tokens .* on cpu.* Tried to allocate") as caught:
        engine.submit(Request(sounds(29), (CAPTION,))).result(timeout=60)
    assert (caught.value.stage, caught.value.reason) == (Stage.GENERATE, Reason.OUT_OF_MEMORY)
    assert answers(engine, requests[:1]) == expected[:1]


def test_slots_that_do_not_fit_are_fewer_and_those_of_other_lengths_make_room(
    open_model, tiny_af3, af3_oracle, monkeypatch
):
    """A memory of 2,000 positions, in which short prompts hold 640 each and long ones 1,280."""
    create, held = Slots.__init__, {}

    def fits(slots, model, count, capacity, **options):
        if sum(size for key, size in held.items() if key() is not None) + count * capacity > 2000:
            raise out_of_memory()
        create(slots, model, count, capacity, **options)
        held[weakref.ref(slots)] = count * capacity

    monkeypatch.setattr(Slots, "__init__", fits)
    engine = open_model(tiny_af3, slots=8)
    requests = [Request(sounds((1, 29)[i % 2], seed=i), (CAPTION,)) for i in range(8)]
    expected = [[af3_oracle.ask(request.samples, CAPTION)] for request in requests]
    assert answers(engine, requests) == expected
    with pytest.raises(Rejected, match="no room for a slot of 2560 positions on cpu") as caught:
        engine.submit(Request(sounds(59), (CAPTION,))).result(timeout=60)
    assert caught.value.reason is Reason.OUT_OF_MEMORY
    assert answers(engine, requests) == expected


def test_encoder_out_of_memory_takes_fewer_windows(open_model, tiny_af3, af3_oracle, monkeypatch):
    embed, sizes = AudioEncoder._embed, []

    def at_most_two_windows(encoder, batch):
        sizes.append(len(batch.windows))
        if sizes[-1] > 2:
            raise out_of_memory()
        return embed(encoder, batch)

    monkeypatch.setattr(AudioEncoder, "_embed", at_most_two_windows)
    engine = open_model(tiny_af3)
    engine._encoder.max_positions = 9000
    request = Request(sounds(150), (CAPTION,))
    assert engine.submit(request).result(timeout=60) == [af3_oracle.ask(request.samples, CAPTION)]
    assert sizes == [5, 2, 2, 1]


@pytest.mark.gpu
def test_a_real_out_of_memory_costs_nothing_but_time(open_model, tiny_af3):
    """All memory but 300 MB is taken away, then many long recordings are asked about at once."""
    engine = open_model(tiny_af3, slots=64, dtype="float32")
    requests = [Request(sounds(300, seed=i), (CAPTION,)) for i in range(8)]
    expected = answers(engine, requests)
    hog = torch.empty(torch.cuda.mem_get_info()[0] - (300 << 20), dtype=torch.uint8, device="cuda")
    fresh = open_model(tiny_af3, slots=64, dtype="float32")
    assert answers(fresh, requests) == expected
    del hog


@pytest.mark.gpu
def test_steps_are_captured_and_answer_the_same(open_model, tiny_af3, monkeypatch, caplog):
    """In float32; and the memory of slots that nobody needs any more is free at once, without a collection."""
    some = CAPTION._replace(decoding=Decoding(max_new_tokens=40))
    requests = [Request(sounds(1 + 2 * i, seed=i), (some if i % 3 else CAPTION,)) for i in range(24)]
    plain = open_model(tiny_af3, dtype="float32", device="cuda", cuda_graphs=False, slots=16)
    expected = answers(plain, requests)
    kept, replays = [], []
    init, replay = Slots.__init__, torch.cuda.CUDAGraph.replay

    def init_and_tell(slots, *args, **options):
        kept.append(weakref.ref(slots))
        init(slots, *args, **options)

    monkeypatch.setattr(Slots, "__init__", init_and_tell)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    engine = open_model(tiny_af3, dtype="float32", device="cuda", slots=16)
    assert answers(engine, requests) == expected
    assert "CUDA graphs are not used" not in caplog.text
    assert len(replays) > 20
    gc.disable()
    try:
        for pool in engine._pools:
            pool.close()
        assert kept
        assert not any(slots() for slots in kept)
    finally:
        gc.enable()


def test_a_lost_device_fails_everything_and_the_engine(open_model, tiny_af3, monkeypatch):
    all_asked = threading.Event()
    lost = RuntimeError("CUDA error: an illegal memory access")
    poison_steps(monkeypatch, lambda at: all_asked.wait(60), lambda: lost)
    engine = open_model(tiny_af3)
    futures = [engine.submit(Request(sounds(1, seed=i), (CAPTION,))) for i in range(3)]
    all_asked.set()
    for future in futures:
        with pytest.raises(EngineFailed, match=r"lost.*illegal memory access"):
            future.result(timeout=60)
    with pytest.raises(EngineFailed):
        engine.submit(Request(sounds(1), (CAPTION,)))


def test_a_bug_in_the_loop_leaves_nobody_waiting(open_model, tiny_af3, monkeypatch):
    engine = open_model(tiny_af3)
    monkeypatch.setattr(engine, "_step", lambda pool: 1 / 0)
    with pytest.raises(EngineFailed, match="ZeroDivisionError"):
        engine.submit(Request(sounds(1), (CAPTION,))).result(timeout=60)
    with pytest.raises(EngineFailed, match="ZeroDivisionError"):
        engine.submit(Request(sounds(1), (CAPTION,)))


def hold_steps(monkeypatch):
    """Steps wait for `go_on`; `begun` is set by the first."""
    begun, go_on, step = threading.Event(), threading.Event(), Slots.step

    def wait_and_step(slots, *arguments):
        begun.set()
        assert go_on.wait(60)
        return step(slots, *arguments)

    monkeypatch.setattr(Slots, "step", wait_and_step)
    return begun, go_on


def test_close_fails_everything_after_the_step_under_way(open_model, tiny_af3, monkeypatch):
    begun, go_on = hold_steps(monkeypatch)
    engine = open_model(tiny_af3, slots=2)
    futures = [engine.submit(Request(sounds(1, seed=i), (LONG,))) for i in range(5)]
    assert begun.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: not engine.is_open)
    go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert engine.take_stats().steps == 1, "it takes 2000 to answer them"
    assert all(isinstance(future.exception(timeout=0), EngineFailed) for future in futures)
    with pytest.raises(EngineFailed, match="closed"):
        engine.submit(Request(sounds(1), (CAPTION,)))
    engine.close()


def test_a_cancelled_request_is_not_worked_on(open_model, tiny_af3, monkeypatch):
    begun, go_on = hold_steps(monkeypatch)
    engine = open_model(tiny_af3, slots=1)
    first = engine.submit(Request(sounds(1), (CAPTION,)))
    assert begun.wait(60)
    second = engine.submit(Request(sounds(5), (CAPTION,)))
    assert second.cancel()
    go_on.set()
    first.result(timeout=60)
    engine.submit(Request(sounds(2), (CAPTION,))).result(timeout=60)
    assert engine.take_stats().windows == 2


def test_submit_blocks_while_this_thread_has_enough_waiting(open_model, tiny_af3, monkeypatch):
    begun, go_on = hold_steps(monkeypatch)
    engine = open_model(tiny_af3, slots=2)
    futures = []

    def feed():
        for _ in range(12):
            futures.append(engine.submit(Request(sounds(1), (CAPTION,))))

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert begun.wait(60)
    wait_until(lambda: somebody_waits_for(engine._queue._changed))  # the feeder: the engine's thread is in its step
    in_slots = len(engine._working)  # one, if the second came when the step had begun
    assert in_slots in (1, 2)
    assert len(futures) == in_slots + 4, "twice as many wait as there are slots"
    other = engine.submit(Request(sounds(1), (CAPTION,)))  # another caller is not held up
    go_on.set()
    feeder.join(60)
    assert len({future.result(timeout=60)[0] for future in [*futures, other]}) == 1


def test_a_free_slot_is_taken_at_once(open_model, tiny_af3):
    """One long reply and many short ones: they share the steps of the long one."""
    engine = open_model(tiny_af3, slots=2)
    lengths = [60, *[6] * 10]
    tasks = [CAPTION._replace(decoding=Decoding(max_new_tokens=n, min_new_tokens=n)) for n in lengths]
    answers(engine, [Request(sounds(1), (task,)) for task in tasks])
    stats = engine.take_stats()
    assert stats.new_tokens == sum(lengths)
    assert stats.steps == stats.slot_capacity / 2 <= 62


def test_requests_that_end_at_once_do_not_hold_up_those_in_the_slots(open_model, tiny_af3, monkeypatch):
    """Each reply of one token brings the next such request, as a busy caller does."""
    engine = open_model(tiny_af3, slots=2)
    one = Request(sounds(0.5), (CAPTION._replace(decoding=Decoding(max_new_tokens=1)),))
    long = Request(sounds(1), (CAPTION._replace(decoding=Decoding(max_new_tokens=30, min_new_tokens=30)),))
    taken, answered = engine._take, []

    def take_after_another():
        if len(answered) < 200 and not futures[0].done():
            answered.append(engine.submit(one))
        return taken()

    futures = [engine.submit(long)]
    monkeypatch.setattr(engine, "_take", take_after_another)
    futures[0].result(timeout=60)
    assert len(answered) < 40
    assert len({future.result(timeout=60)[0] for future in answered}) == 1


def test_each_segment_is_encoded_once_and_its_prefix_prefilled_once(open_model, tiny_af3):
    engine = open_model(tiny_af3, slots=4)
    tasks = tuple(CAPTION._replace(prompt=f"Question {i}?") for i in range(5))
    replies = engine.submit(Request(sounds(65), tasks)).result(timeout=60)
    engine.submit(Request(sounds(1), tasks[:1])).result(timeout=60)
    stats = engine.take_stats()
    assert (stats.requests, stats.windows) == (2, 4)
    assert stats.audio_tokens == replies[0].audio_tokens + 25
    assert stats.prompt_tokens > 5 * replies[0].audio_tokens
    assert stats.reused_tokens > 4 * replies[0].audio_tokens
    assert stats.slot_steps == stats.new_tokens - 6, "the first token of each comes with its prompt"
    assert stats.slot_steps <= stats.slot_capacity
    assert min(stats.encode_s, stats.prefill_s, stats.decode_s) > 0
    assert engine.take_stats()._replace(idle_s=0) == type(stats)()


def test_a_later_turn_finds_the_conversation_in_its_slot(open_model, demo_oracle):
    """The demo model's replies are read back as the tokens they were given as, so all of them is reused."""
    decoding = Decoding(max_new_tokens=20)
    first = resolve(caption(), "AudioFlamingo3")._replace(decoding=decoding)
    second = Task("answer", "What is the sound?", decoding=decoding, history=first.turns)
    third = Task("answer", "Is there speech?", decoding=decoding, history=second.turns)
    request = Request(clip("siren"), (first, second, third))
    engine = open_model("demo", slots=2)
    replies = engine.submit(request).result(timeout=60)
    assert replies == list(demo_oracle.ask_all(request))
    stats = engine.take_stats()
    # Each turn begins with the whole prompt before it, and with the reply to that but for its end.
    reused = sum(reply.prompt_tokens + reply.new_tokens - 1 for reply in replies[:2])
    assert stats.reused_tokens == reused


def test_a_conversation_may_outgrow_the_slots_it_was_meant_for(open_model, tiny_af3, af3_oracle):
    """Random tokens are odd bytes: read back as text they are half as many again, more than what is allowed for."""
    decoding = Decoding(max_new_tokens=400, min_new_tokens=400, do_sample=True, temperature=3.0, top_k=0, seed=1)
    first = CAPTION._replace(decoding=decoding)
    request = Request(sounds(2), (first, Task("answer", "Why?", decoding=Decoding(5), history=first.turns)))
    expected = list(af3_oracle.ask_all(request))
    assert expected[1].prompt_tokens > 640
    engine = open_model(tiny_af3)
    assert engine.submit(request).result(timeout=60) == expected
    assert [pool.capacity for pool in engine._pools] == [640, 1280], "otherwise this shows nothing"


def test_text_without_audio_only_where_it_is_asked_for(open_model, tiny_af3):
    engine = open_model(tiny_af3)
    with pytest.raises(Rejected, match=r"task 'caption' has no audio; .* audios=\(\)") as caught:
        engine.submit(Request((), (CAPTION,))).result(timeout=60)
    assert caught.value.reason is Reason.TOO_SHORT
    (reply,) = engine.submit(Request((), (CAPTION._replace(audios=()),))).result(timeout=60)
    assert reply.audio_tokens == 0


def test_a_constraint_that_cannot_be_used_ends_the_job(open_model, tiny_af3):
    task = CAPTION._replace(decoding=Decoding(json_schema='{"type": "no such type"}'))
    with pytest.raises(ModelError, match=r"json_schema .* cannot be used"):
        open_model(tiny_af3).submit(Request(sounds(1), (task,))).result(timeout=60)


def test_the_demo_engine_says_what_it_is():
    engine = open_engine(EngineOptions("demo"))
    info = engine.info
    engine.close()
    assert (info.model_id, info.family, info.engine) == ("demo", "AudioFlamingo3", "transformers")
    assert info.model_revision.startswith("sha256:")
    if not torch.cuda.is_available():
        assert (info.dtype, info.device) == ("float32", "cpu")


def test_the_framing_of_a_transcript_is_removed_only_when_asked(open_model):
    task = resolve(transcript(), "AudioFlamingo3")
    request = Request(clip("digits_seven_three_one"), (task, task._replace(strip_prefix=False)))
    stripped, framed = open_model("demo").submit(request).result(timeout=60)
    assert stripped.text == "seven three one"
    assert framed.text == 'The spoken content of the audio is "seven three one".'
    assert stripped.tokens == framed.tokens


def test_music_flamingo_knows_no_framing_and_is_not_asked_to(open_model, tiny_mf):
    task = resolve(transcript(max_new_tokens=5), "MusicFlamingo")
    assert task.strip_prefix
    open_model(tiny_mf).submit(Request(sounds(1), (task,))).result(timeout=60)


def test_one_engine_for_equal_options(tiny_af3):
    options = EngineOptions(str(tiny_af3))
    engine = acquire_engine(options)
    assert acquire_engine(options) is engine
    release_engine(options)
    engine.submit(Request(sounds(1), (CAPTION,))).result(timeout=60)
    release_engine(options)
    with pytest.raises(EngineFailed):
        engine.submit(Request(sounds(1), (CAPTION,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "trition"}, "engine 'trition' is not known; choose from .*transformers"),
        ({"dtype": "float8"}, "dtype 'float8' is not known; choose from auto, bfloat16"),
        ({"device": "gpu0"}, "device 'gpu0' is not known to torch"),
    ],
)
def test_wrong_options(tiny_af3, options, message):
    with pytest.raises(ModelError, match=message):
        open_engine(EngineOptions(str(tiny_af3), **options))


def test_broken_and_incomplete_weights(tiny_af3, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in tiny_af3.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors[next(name for name in tensors if "multi_modal_projector" in name)]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing from .*projector"):
        open_engine(EngineOptions(str(tmp_path)))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="its weights cannot be loaded from"):
        open_engine(EngineOptions(str(tmp_path)))
