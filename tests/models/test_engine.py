"""What the engine promises beside the right answers: nobody waits for ever, and each request fails alone."""

import threading
import time

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
from af3pipe.schemas import Reason, Rejected, Request, Stage, Task
from tests.models.conftest import clip, sounds

CAPTION = resolve(caption(max_new_tokens=6), "AudioFlamingo3")
LONG = resolve(caption(max_new_tokens=2000), "AudioFlamingo3")


def poison(engine, is_poisoned, error):
    """Makes the model's own generate raise for every batch in which a row has a poisoned prompt length."""
    generate = engine._model.generate
    batches = []

    def generate_or_raise(**inputs):
        lengths = inputs["attention_mask"].sum(1).tolist()
        batches.append(lengths)
        if any(is_poisoned(length) for length in lengths):
            raise error()
        return generate(**inputs)

    engine._model.generate = generate_or_raise
    return batches


def test_one_poisoned_request_fails_alone(open_model, tiny_af3, af3_oracle):
    engine = open_model(tiny_af3)
    requests = [Request(sounds(0.5 + i / 4, seed=i), (CAPTION,)) for i in range(8)]
    expected = [af3_oracle.ask(request.samples, CAPTION) for request in requests]
    poison(engine, lambda length: length == expected[5].prompt_tokens, lambda: ZeroDivisionError("poisoned"))
    futures = [engine.submit(request) for request in requests]
    for i, future in enumerate(futures):
        if i == 5:
            with pytest.raises(ZeroDivisionError, match="poisoned"):
                future.result(timeout=60)
        else:
            assert future.result(timeout=60) == [expected[i]]


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


def test_out_of_memory_splits_is_remembered_and_names_the_numbers(open_model, tiny_af3, af3_oracle):
    engine = open_model(tiny_af3)
    requests = [Request(sounds(1 + i / 10, seed=i), (CAPTION,)) for i in range(8)]
    generate = engine._model.generate
    sizes = []

    def at_most_two_rows(**inputs):
        sizes.append(len(inputs["attention_mask"]))
        if sizes[-1] > 2 or inputs["attention_mask"].shape[1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")
        return generate(**inputs)

    engine._model.generate = at_most_two_rows
    for _ in range(2):
        futures = [engine.submit(request) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            assert future.result(timeout=60) == [af3_oracle.ask(request.samples, CAPTION)]
    assert sizes[0] == 8
    assert max(sizes[-4:]) <= 2, "the second round must not try again what did not fit"
    with pytest.raises(Rejected, match=r"\d{3,} prompt tokens .* do not fit cpu .* Tried to allocate") as caught:
        engine.submit(Request(sounds(29), (CAPTION,))).result(timeout=60)
    assert (caught.value.stage, caught.value.reason) == (Stage.GENERATE, Reason.OUT_OF_MEMORY)


def test_encoder_out_of_memory_takes_fewer_windows(open_model, tiny_af3, af3_oracle):
    engine = open_model(tiny_af3)
    tower = engine._core.audio_tower.forward
    sizes = []

    def at_most_two_windows(features, **kwargs):
        sizes.append(len(features))
        if len(features) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tower(features, **kwargs)

    engine._core.audio_tower.forward = at_most_two_windows
    request = Request(sounds(130), (CAPTION,))
    assert engine.submit(request).result(timeout=60) == [af3_oracle.ask(request.samples, CAPTION)]
    assert sizes == [5, 4, 2, 2, 1]


def test_a_lost_device_fails_everything_and_the_engine(open_model, tiny_af3):
    engine = open_model(tiny_af3)
    poison(engine, lambda length: True, lambda: RuntimeError("CUDA error: an illegal memory access"))
    futures = [engine.submit(Request(sounds(1, seed=i), (CAPTION,))) for i in range(3)]
    for future in futures:
        with pytest.raises(EngineFailed, match=r"lost.*illegal memory access"):
            future.result(timeout=60)
    with pytest.raises(EngineFailed):
        engine.submit(Request(sounds(1), (CAPTION,)))


def test_a_bug_in_the_loop_leaves_nobody_waiting(open_model, tiny_af3, monkeypatch):
    engine = open_model(tiny_af3)
    monkeypatch.setattr(engine, "_batches", lambda rows: 1 / 0)
    with pytest.raises(EngineFailed, match="ZeroDivisionError"):
        engine.submit(Request(sounds(1), (CAPTION,))).result(timeout=60)
    with pytest.raises(EngineFailed, match="ZeroDivisionError"):
        engine.submit(Request(sounds(1), (CAPTION,)))


def test_close_answers_or_fails_everything_at_once(open_model, tiny_af3):
    engine = open_model(tiny_af3, slots=2)
    futures = [engine.submit(Request(sounds(1, seed=i), (LONG,))) for i in range(5)]
    deadline = time.monotonic() + 30
    while not futures[0].running() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # into the decoding of the first batch
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 10, "close waited for 2000 tokens"
    assert all(isinstance(future.exception(timeout=0), EngineFailed) for future in futures)
    with pytest.raises(EngineFailed, match="closed"):
        engine.submit(Request(sounds(1), (CAPTION,)))
    engine.close()


def test_a_cancelled_request_is_not_worked_on(open_model, tiny_af3):
    engine = open_model(tiny_af3, slots=1)
    begun, go_on = threading.Event(), threading.Event()
    generate, lengths = engine._model.generate, []

    def wait_and_generate(**inputs):
        lengths.append(int(inputs["attention_mask"].sum()))
        begun.set()
        assert go_on.wait(60)
        return generate(**inputs)

    engine._model.generate = wait_and_generate
    first = engine.submit(Request(sounds(1), (CAPTION,)))
    assert begun.wait(60)
    second = engine.submit(Request(sounds(5), (CAPTION,)))
    assert second.cancel()
    go_on.set()
    first.result(timeout=60)
    engine.submit(Request(sounds(2), (CAPTION,))).result(timeout=60)
    assert len(lengths) == 2


def test_submit_blocks_while_two_batches_wait(open_model, tiny_af3):
    engine = open_model(tiny_af3, slots=2)
    go_on, generate = threading.Event(), engine._model.generate
    engine._model.generate = lambda **inputs: go_on.wait(60) and generate(**inputs)
    futures = []

    def feed():
        for _ in range(12):
            futures.append(engine.submit(Request(sounds(1), (CAPTION,))))

    feeder = threading.Thread(target=feed)
    feeder.start()
    time.sleep(1)
    assert len(futures) <= 2 + 4, "a batch at work, two that wait"
    go_on.set()
    feeder.join(60)
    assert len({future.result(timeout=60)[0] for future in futures}) == 1


def test_each_segment_is_encoded_once_and_work_is_told_once(open_model, tiny_af3):
    engine = open_model(tiny_af3, slots=4)
    tasks = tuple(CAPTION._replace(prompt=f"Question {i}?") for i in range(5))
    replies = engine.submit(Request(sounds(65), tasks)).result(timeout=60)
    engine.submit(Request(sounds(1), tasks[:1])).result(timeout=60)
    stats = engine.take_stats()
    assert (stats.requests, stats.windows, stats.slot_steps) == (2, 4, 6)
    assert stats.audio_tokens == replies[0].audio_tokens + 25
    assert stats.prompt_tokens > 5 * replies[0].audio_tokens
    assert stats.slot_capacity == 4 * stats.steps == 12
    assert min(stats.encode_s, stats.prefill_s, stats.decode_s) > 0
    assert engine.take_stats()._replace(idle_s=0) == type(stats)()


def test_the_demo_engine_says_what_it_is(open_model):
    info = open_model("demo").info
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
        ({"engine": "trition"}, "engine 'trition' is not known; choose from transformers"),
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
