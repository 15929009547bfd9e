"""Defines three ways to process the same requests, and the models that they are measured on.

`alone` is the model card's loop and `batches` is its usual extension: unmodified processor and `generate` as in the
card, set only to greedy decoding and a number of tokens. `engine` is this package's engine. Each request has one
task.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    AutoProcessor,
    GenerationConfig,
    Qwen2Config,
)

from af3pipe.models import EngineOptions, open_checkpoint, open_engine
from af3pipe.models.engine import Engine
from af3pipe.models.transformers_engine import TransformersEngine
from af3pipe.schemas import Decoding, Request

BATCH_SIZE = 8
Tokens = list[list[int]]
T = TypeVar("T")


class Loaded(NamedTuple):
    """A model on its device and in its dtype, with its processor."""

    model: Any
    processor: Any


def exactly(new_tokens: int) -> Decoding:
    """Greedy, and just as long: an end-of-sequence token never wins."""
    return Decoding(max_new_tokens=new_tokens, min_new_tokens=new_tokens)


def asked_tokens(request: Request) -> int:
    """How many new tokens a request of one task wants."""
    return request.tasks[0].decoding.max_new_tokens


def apart(work: Callable[[], T]) -> T:
    """Does work on a thread of its own, which then ends.

    OpenMP keeps helpers for each thread that used torch, for as long as it lives; while there are more of them than
    cores, all wait by sleeping, and small operations take up to twice as long. So each contender has them to itself.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


# -- the contenders -------------------------------------------------------------------------------------------------


def alone(stock: Loaded, requests: Iterable[Request]) -> Tokens:
    """The model card's loop: one recording after the other."""
    return [row for request in requests for row in generate(stock, [request])]


def batches(stock: Loaded, requests: Sequence[Request]) -> Tokens:
    """Static batches in the order of arrival; each ends when its longest reply does."""
    starts = range(0, len(requests), BATCH_SIZE)
    return [row for start in starts for row in generate(stock, requests[start : start + BATCH_SIZE])]


@torch.inference_mode()
def generate(stock: Loaded, requests: Sequence[Request]) -> Tokens:
    """Stock processor and `generate`; it pads on the left by itself. A row's reply is its first tokens."""
    model, processor = stock
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": request.tasks[0].prompt},
                    {"type": "audio", "audio": request.samples},
                ],
            }
        ]
        for request in requests
    ]
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, add_generation_prompt=True, return_dict=True
    ).to(model.device, model.dtype)
    longest = max(map(asked_tokens, requests))
    outputs = model.generate(
        **inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=longest, min_new_tokens=longest
    )
    replies = outputs[:, inputs.input_ids.shape[1] :]
    processor.batch_decode(replies, skip_special_tokens=True)
    return [row[: asked_tokens(request)] for row, request in zip(replies.tolist(), requests, strict=True)]


def engine(opened: Engine, requests: Iterable[Request]) -> Tokens:
    """This package's engine: submit everything from one thread, then gather."""
    futures = [opened.submit(request) for request in requests]
    return [list(future.result()[0].tokens) for future in futures]


# -- their models ---------------------------------------------------------------------------------------------------


def load(model: str, device: str, dtype: torch.dtype) -> Loaded:
    """A checkpoint for the stock contenders."""
    checkpoint = open_checkpoint(model)
    model_class = getattr(transformers, f"{checkpoint.family}ForConditionalGeneration")
    loaded = model_class.from_pretrained(checkpoint.source, dtype=dtype).to(device).eval()
    return Loaded(loaded, AutoProcessor.from_pretrained(checkpoint.source))


def open_ours(options: EngineOptions, loaded: Loaded | None = None) -> Engine:
    """The engine, opened as a user opens it; or around a model that is loaded already.

    With `loaded`, the checkpoint that `options` name tells only the limits of its audio and a name. The engine gets
    modules of its own over the same weights: it sets its own attention in them, which stock code must not meet.
    """
    if loaded is None:
        return open_engine(options)
    weights = [*loaded.model.parameters(), *loaded.model.buffers()]
    modules = copy.deepcopy(loaded.model, {id(tensor): tensor for tensor in weights})
    return TransformersEngine(options, loaded=(modules, loaded.processor))


def released_shape() -> AudioFlamingo3Config:
    """The released Audio Flamingo 3: Whisper large v3's encoder and Qwen2.5-7B, with the demo's special tokens."""
    return AudioFlamingo3Config(
        audio_config=AudioFlamingo3EncoderConfig(),
        text_config=Qwen2Config(
            vocab_size=151_672,
            hidden_size=3584,
            intermediate_size=18_944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=32_768,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        ),
    )


def random_model(config: AudioFlamingo3Config, device: str, dtype: torch.dtype) -> Loaded:
    """A model of this shape with random weights, made where it is used: nothing is read, and nothing is written.

    The processor is the demo checkpoint's: its token ids are the first few hundred of any vocabulary.
    """
    source = open_checkpoint("demo").source
    processor = AutoProcessor.from_pretrained(source)
    config.audio_token_id = processor.audio_token_id
    torch.manual_seed(0)
    with torch.device(device):
        model = AudioFlamingo3ForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig.from_pretrained(Path(source))
    return Loaded(model.eval(), processor)
