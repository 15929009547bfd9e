"""The tiny Audio Flamingo 3: tokenizer, configuration, mel features, the encoder on short audio, saving.

Training skips what the released processor pads: a window of 2 s is computed as 2 s, not as 30 s. Hugging Face
masks the padding, so that both give the same.
"""

import copy
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    WhisperFeatureExtractor,
)
from vocabulary import MIX_JOINT, ask, draw_scene

WIDTH = 192
HEAD_WIDTH = 64
ENCODER_LAYERS = 4
TEXT_LAYERS = 3
HOP = 160  # samples a mel frame
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<sound>",
    "<|sound_bos|>",
    "<|sound_eos|>",
]
BEFORE_AUDIO = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages if m['content'] is not none %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% set audio = namespace(found=False) %}{% set text = namespace(v='') %}"
    "{% for c in m['content'] %}"
    "{% if c.get('type') == 'audio' or 'audio' in c %}{% set audio.found = True %}"
    "{% elif c.get('type') == 'text' or 'text' in c %}{% set text.v = text.v + c['text'] %}{% endif %}"
    "{% endfor %}"
    "{% if audio.found %}{{ '<sound>' }}{% endif %}{{ text.v }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_EXTRACTOR = WhisperFeatureExtractor(feature_size=128, return_attention_mask=True)
_MEL_FILTERS = torch.from_numpy(_EXTRACTOR.mel_filters).float()
_WINDOW = torch.hann_window(400)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on questions and answers drawn as in training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng, corpus = random.Random(0), []
    for _ in range(4000):
        question, answer = ask(rng, draw_scene(rng, rng.choice(MIX_JOINT)))
        corpus += ["system\nYou are a helpful assistant.", "user\n" + question, "assistant\n" + answer]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> AudioFlamingo3Config:
    heads = WIDTH // HEAD_WIDTH
    encoder = AudioFlamingo3EncoderConfig(
        hidden_size=WIDTH,
        num_hidden_layers=ENCODER_LAYERS,
        num_attention_heads=heads,
        intermediate_size=4 * WIDTH,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=1,
        max_position_embeddings=32768,
        rope_theta=1e6,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=0,
        pad_token_id=0,
    )
    sound = tokenizer.convert_tokens_to_ids("<sound>")
    return AudioFlamingo3Config(audio_config=encoder, text_config=text, audio_token_id=sound)


def build_model() -> tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor]:
    """Return a model of random weights, with the sinusoidal positions of Whisper, and its processor."""
    tokenizer = build_tokenizer()
    processor = AudioFlamingo3Processor(_EXTRACTOR, tokenizer, chat_template=CHAT_TEMPLATE)
    model = AudioFlamingo3ForConditionalGeneration(_config(tokenizer))
    half = WIDTH // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    angles = torch.arange(1500)[:, None] * rates[None]
    model.model.audio_tower.embed_positions.weight.data = torch.cat([angles.sin(), angles.cos()], 1)
    freeze_positions(model)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids("<|im_end|>"), 0],
        pad_token_id=0,
        bos_token_id=0,
        do_sample=False,
        max_new_tokens=128,
    )
    return model, processor


def freeze_positions(model: AudioFlamingo3ForConditionalGeneration) -> None:
    """Keep the encoder's positions as they are."""
    model.model.audio_tower.embed_positions.weight.requires_grad_(False)


def save(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    out: Path,
    *,
    half: bool = False,
) -> None:
    """Write a checkpoint, in float16 if `half`; the model itself is left as it is."""
    if half:
        model = copy.deepcopy(model).half()
        model.config.audio_config.dtype = model.config.text_config.dtype = "float16"
    model.save_pretrained(out)
    processor.save_pretrained(out)


def mel_features(recordings: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what WhisperFeatureExtractor computes, padded to the longest instead of 30 s.

    Args:
        recordings: float32 of shape (frames,), 16 kHz mono.

    Returns:
        Log-mel float32 (recordings, 128, mel frames), and the valid mel frames of each.
    """
    valid = torch.tensor([math.ceil(len(pcm) / HOP) for pcm in recordings])
    frames = (int(valid.max()) + 8 + 3) // 4 * 4
    padded = torch.zeros(len(recordings), frames * HOP + 400)
    for row, pcm in enumerate(recordings):
        padded[row, : len(pcm)] = torch.from_numpy(pcm)
    power = torch.stft(padded, 400, HOP, window=_WINDOW, return_complex=True)[..., :frames].abs() ** 2
    log_mel = torch.clamp(_MEL_FILTERS.T @ power, min=1e-10).log10()
    floor = log_mel.amax((1, 2), keepdim=True) - 8
    return (torch.maximum(log_mel, floor) + 4) / 4, valid


def encode(
    model: AudioFlamingo3ForConditionalGeneration, mel: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the audio tower on windows shorter than 30 s.

    Returns:
        Hidden states (recordings, audio tokens, WIDTH), and the valid audio tokens of each.
    """
    tower = model.model.audio_tower
    hidden = functional.gelu(tower.conv1(mel))
    hidden = functional.gelu(tower.conv2(hidden)).transpose(1, 2)
    hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
    positions = (valid - 1) // 2 + 1
    inside = torch.arange(hidden.shape[1])[None] < positions[:, None]
    mask = torch.zeros(len(valid), 1, 1, hidden.shape[1]).masked_fill(~inside[:, None, None], -1e9)
    for layer in tower.layers:
        hidden = layer(hidden, mask)
    pooled = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
    return tower.layer_norm(pooled), (positions - 2) // 2 + 1
