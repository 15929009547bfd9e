"""Computes the least arithmetic and memory reads of a model for given audio and replies, without torch.

A floating point operation is a multiplication or an addition, so a product of (m, k) and (k, n) matrices has 2 m k n
of them. Padding does not count: windows are as long as their audio, and each position counts once. Biases, norms,
activations, softmax and rotary angles do not count, since they are small compared with the matrix products.
"""

from collections.abc import Sequence
from math import ceil, log2
from typing import Any, NamedTuple


class Dims(NamedTuple):
    """Sizes of a checkpoint, as its config has them.

    Attributes:
        audio_width: This, `audio_ffn` and `audio_layers`: of the audio encoder.
        width: This and the rest: of the language model.
    """

    mel_bins: int
    audio_width: int
    audio_ffn: int
    audio_layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    layers: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> "Dims":
        """Of an AudioFlamingo3 or MusicFlamingo config."""
        audio, text = config.audio_config, config.text_config
        return cls(
            mel_bins=audio.num_mel_bins,
            audio_width=audio.hidden_size,
            audio_ffn=audio.intermediate_size,
            audio_layers=audio.num_hidden_layers,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            ffn=text.intermediate_size,
            layers=text.num_hidden_layers,
            vocab=text.vocab_size,
        )


class Work(NamedTuple):
    """Operations, by what they are for."""

    mel: float
    encode: float
    prefill: float

    @property
    def total(self) -> float:
        return sum(self)


# -- lengths --------------------------------------------------------------------------------------------------------


def window_frames(samples: int, window_samples: int = 480_000, hop: int = 160) -> list[int]:
    """Mel frames of each window of a segment of so many samples: ceil(n / hop)."""
    return [ceil(min(window_samples, samples - start) / hop) for start in range(0, samples, window_samples)]


def encoder_positions(frames: int) -> int:
    """What the encoder's second convolution leaves of a window's mel frames: half."""
    return (frames - 1) // 2 + 1


def audio_tokens(frames: int) -> int:
    """What the pooling leaves of a window's mel frames: a quarter."""
    return (encoder_positions(frames) - 2) // 2 + 1


# -- operations -----------------------------------------------------------------------------------------------------


def mel_flops(frames: int, bins: int, n_fft: int = 400) -> float:
    """Log-mel of one window: a real FFT a frame, 2.5 n log2 n, and the filter bank."""
    return frames * 2.5 * n_fft * log2(n_fft) + filterbank_flops(frames, bins, n_fft)


def filterbank_flops(frames: int, bins: int, n_fft: int = 400) -> int:
    """(bins, n/2 + 1) filters times the power spectrum of each frame."""
    return 2 * frames * bins * (n_fft // 2 + 1)


def attention_flops(pairs: int, width: int) -> int:
    """Scores and weighted values of so many pairs of a query and a key, over heads of `width` in all."""
    return 2 * 2 * pairs * width


def encoder_flops(frames: int, dims: Dims) -> int:
    """The audio encoder over one window: two convolutions of 3 taps, then the layers.

    A layer: q, k, v and o (4 width²), fc1 and fc2 (2 width x ffn), and attention of every position to every one.
    """
    width, length = dims.audio_width, encoder_positions(frames)
    convolutions = 2 * 3 * width * (frames * dims.mel_bins + length * width)
    linear = 2 * length * (4 * width * width + 2 * width * dims.audio_ffn)
    return convolutions + dims.audio_layers * (linear + attention_flops(length * length, width))


def projector_flops(tokens: int, dims: Dims) -> int:
    """The two linear layers between audio encoder and language model."""
    return 2 * tokens * dims.width * (dims.audio_width + dims.width)


def layer_weights(dims: Dims) -> int:
    """Entries of the matrices in one layer of the language model: q, o, k, v, and the three of the MLP."""
    attention = 2 * dims.width * dims.head_dim * (dims.heads + dims.kv_heads)
    return attention + 3 * dims.width * dims.ffn


def prefill_flops(tokens: int, dims: Dims) -> int:
    """The language model over one prompt: all its layers, attention to what came before, logits of the last token."""
    pairs = tokens * (tokens + 1) // 2
    linear = 2 * tokens * layer_weights(dims)
    attention = attention_flops(pairs, dims.heads * dims.head_dim)
    return dims.layers * (linear + attention) + 2 * dims.width * dims.vocab


def least_work(samples: Sequence[int], prompt_tokens: Sequence[int], dims: Dims) -> Work:
    """What it takes to hear segments and to read their prompts.

    Args:
        samples: Length of each segment.
        prompt_tokens: Length of each prompt, its audio tokens included.
        dims: Of the checkpoint.
    """
    frames = [frames for n in samples for frames in window_frames(n) if audio_tokens(frames)]
    return Work(
        mel=sum(mel_flops(each, dims.mel_bins) for each in frames),
        encode=sum(encoder_flops(each, dims) + projector_flops(audio_tokens(each), dims) for each in frames),
        prefill=sum(prefill_flops(tokens, dims) for tokens in prompt_tokens),
    )


# -- bytes ----------------------------------------------------------------------------------------------------------


def step_weights(dims: Dims) -> int:
    """Weights that a decoding step reads, however many prompts it is for: all layers, the last norm, the logits."""
    biases_and_norms = (dims.heads + 2 * dims.kv_heads) * dims.head_dim + 2 * dims.width
    return dims.layers * (layer_weights(dims) + biases_and_norms) + dims.width + dims.width * dims.vocab


def read_positions(prompt_tokens: int, new_tokens: int) -> int:
    """Positions whose keys and values are read for one reply, over all steps.

    The first token comes out of the prefill; step t of the n - 1 others reads the prompt and t tokens.
    """
    steps = new_tokens - 1
    return steps * prompt_tokens + steps * (steps + 1) // 2


def least_steps(new_tokens: Sequence[int], slots: int) -> int:
    """Decoding steps that replies of these lengths take at least: all slots full, or the longest reply alone."""
    steps = [n - 1 for n in new_tokens]
    return max(max(steps), ceil(sum(steps) / slots))


def decode_bytes(
    prompt_tokens: Sequence[int], new_tokens: Sequence[int], slots: int, dims: Dims, itemsize: int
) -> int:
    """Bytes that decoding reads at least: the weights once a step, and every reply's own keys and values."""
    positions = sum(map(read_positions, prompt_tokens, new_tokens))
    cache = positions * 2 * dims.layers * dims.kv_heads * dims.head_dim
    return itemsize * (least_steps(new_tokens, slots) * step_weights(dims) + cache)
