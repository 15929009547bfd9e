"""Builds tiny checkpoints with random weights, offline; each request gets a different reply from them.

The tokenizer is the demo checkpoint's, which has the special tokens of both families. The generation config samples,
as the released ones do, so that a greedy reply proves that nothing is taken from it.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    AutoProcessor,
    GenerationConfig,
    MusicFlamingoConfig,
    MusicFlamingoForConditionalGeneration,
    MusicFlamingoProcessor,
    Qwen2Config,
)

from af3pipe.models.family import open_checkpoint

WIDTH = 128


def tiny_audio_flamingo(path: Path, seed: int = 0, **text: int) -> Path:
    """Saves a random AudioFlamingo3 of 2 + 2 layers, and its processor; `text` is for its language model's config."""
    demo = _demo_processor()
    processor = AudioFlamingo3Processor(demo.feature_extractor, demo.tokenizer, chat_template=demo.chat_template)
    return _save(path, AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, processor, seed, text)


def tiny_music_flamingo(path: Path, seed: int = 0, max_audio_len: int = 1200) -> Path:
    """Saves a random MusicFlamingo of 2 + 2 layers, and its processor."""
    demo = _demo_processor()
    processor = MusicFlamingoProcessor(
        demo.feature_extractor, demo.tokenizer, chat_template=demo.chat_template, max_audio_len=max_audio_len
    )
    ids = demo.tokenizer.convert_tokens_to_ids
    return _save(
        path,
        MusicFlamingoConfig,
        MusicFlamingoForConditionalGeneration,
        processor,
        seed,
        {},
        audio_bos_token_id=ids("<|sound_bos|>"),
        audio_eos_token_id=ids("<|sound_eos|>"),
    )


def _demo_processor() -> Any:
    return AutoProcessor.from_pretrained(open_checkpoint("demo").source)


def _save(
    path: Path,
    config_class: Any,
    model_class: Any,
    processor: Any,
    seed: int,
    text: dict[str, int],
    **special_tokens: int,
) -> Path:
    tokenizer = processor.tokenizer
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = config_class(
        audio_config=AudioFlamingo3EncoderConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * WIDTH
        ),
        text_config=Qwen2Config(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": WIDTH,
                "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 32768,
                "eos_token_id": end,
                "bos_token_id": pad,
                "pad_token_id": pad,
                **text,
            }
        ),
        audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"),
        **special_tokens,
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual start: otherwise whatever is heard drowns and all replies are the same.
            if parameter.ndim > 1:
                parameter.normal_(0.0, 2.0 / parameter.shape[-1] ** 0.5)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, pad],
        pad_token_id=pad,
        bos_token_id=pad,
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        repetition_penalty=1.05,
        max_new_tokens=20,
    )
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
