"""Batched decoding with a key-value cache of fixed-size slots, on top of the unmodified language model.

A slot is one row of a cache of fixed size, filled from its start. Keys are stored after the rotary embedding: a row
can be copied, truncated and extended. The model is Hugging Face's; only its attention uses another cache, through
the library's registry of attention functions:

- Prefill: chunks of many prompts are packed into one sequence, and each attends to its own row. No padding.
- Step: one token for each of the first rows, each at its own position. Rows shorter than the longest are masked
  beyond their end.
"""

import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from af3pipe.models.devices import is_out_of_memory

_log = logging.getLogger(__name__)

ATTENTION = "af3pipe_slots"
_LENGTH_ROUNDING = {"cpu": 64, "cuda": 256}  # of the part of the cache that a step looks at
_GRAPH_TOLERANCE = 0.05  # of the largest logit: bfloat16's own noise is smaller, a wrong step is not


class _Attention(Protocol):
    """Stores a layer's new keys and values, and computes attention; shapes (batch, heads, tokens, head size)."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor: ...


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    slots: _Attention,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    return slots(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, _attend)


class LanguageModel:
    """The language model and its output head, with an attention function that uses slots.

    Attributes:
        device: Device of the weights.
        position_bytes: Memory for one position of one slot.
    """

    def __init__(self, model: Any) -> None:
        self._decoder = model.model.language_model
        self._head = model.lm_head
        self._embed = model.get_input_embeddings()
        config = self._decoder.config
        self.device = self._embed.weight.device
        self.dtype = self._embed.weight.dtype
        self.layers = int(config.num_hidden_layers)
        self.heads = int(config.num_key_value_heads)
        self.head_size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.vocabulary = int(self._head.weight.shape[0])
        self.position_bytes = 2 * self.layers * self.heads * self.head_size * self.dtype.itemsize
        self._config = config
        self.stock_attention = str(config._attn_implementation)
        self.attention(ATTENTION)

    def attention(self, name: str) -> None:
        """Selects the attention function: the one over slots, or the unmodified one."""
        self._config._attn_implementation = name

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of token ids."""
        embedded: torch.Tensor = self._embed(ids)
        return embedded

    def hidden(self, embeds: torch.Tensor, positions: torch.Tensor, slots: _Attention) -> torch.Tensor:
        """Returns the last hidden states, shape (batch, tokens, hidden size), at positions (batch, tokens)."""
        output = self._decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, slots=slots)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the float32 logits of the next token, shape (..., vocabulary)."""
        scores: torch.Tensor = self._head(hidden)
        return scores.float()


class Piece(NamedTuple):
    """A chunk of a prompt to prefill.

    Attributes:
        row: Index of the slot.
        start: Position of its first token; everything before it is already in the slot.
        embeds: Shape (tokens, hidden size).
    """

    row: int
    start: int
    embeds: torch.Tensor


class Slots:
    """A key-value cache of slots of one length.

    Args:
        model: The language model.
        count: Number of slots.
        capacity: Positions in each; prompts do not use the last one.
        graphs: Whether steps are captured as CUDA graphs.

    Raises:
        RuntimeError: The slots do not fit in memory, or another error of torch.
    """

    def __init__(self, model: LanguageModel, count: int, capacity: int, *, graphs: bool = False) -> None:
        self.count = count
        self.capacity = capacity
        self._model = model
        # Zeros, because masked values are still multiplied by 0.
        shape = (model.layers, count, model.heads, capacity, model.head_size)
        self._keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._values = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._rows = torch.arange(count, device=model.device)
        # Inputs of a step, at fixed addresses, as CUDA graphs need them.
        self._read = torch.zeros(2, count, dtype=torch.long, device=model.device)
        self._tokens, self._positions = self._read
        self._rounding = _LENGTH_ROUNDING.get(model.device.type, 256)
        self._graphs = _Graphs(model, count) if graphs and model.device.type == "cuda" else None

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of a slot to another."""
        for cache in (self._keys, self._values):
            cache[:, target, :, :length] = cache[:, source, :, :length]
            cache[:, target, :, length:] = 0  # as in prefill: the mask would not hide a NaN there

    @torch.inference_mode()
    def prefill(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Stores chunks of prompts, each in its own slot; returns the logits after the last token of each."""
        ends = np.cumsum([len(piece.embeds) for piece in pieces])
        positions = torch.cat([torch.arange(piece.start, piece.start + len(piece.embeds)) for piece in pieces])
        embeds = torch.cat([piece.embeds for piece in pieces])
        # Counted from the end, as the last token sees all there is; every kernel knows this mask.
        masks = [causal_lower_right(len(piece.embeds), piece.start + len(piece.embeds)) for piece in pieces]

        for piece in pieces:
            # Whoever was here before may have left what is no number (1e30 in a damaged file): no mask hides that.
            for cache in (self._keys, self._values):
                cache[:, piece.row, :, piece.start + len(piece.embeds) :] = 0

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
        ) -> torch.Tensor:
            output = torch.empty_like(query)
            for piece, end, mask in zip(pieces, ends, masks, strict=True):
                now = slice(end - len(piece.embeds), end)
                stop = piece.start + len(piece.embeds)
                keys, values = self._keys[layer, piece.row], self._values[layer, piece.row]
                keys[:, piece.start : stop] = key[0, :, now]
                values[:, piece.start : stop] = value[0, :, now]
                output[:, :, now] = functional.scaled_dot_product_attention(
                    query[:, :, now],
                    _for_heads(query, keys[None, :, :stop]),
                    _for_heads(query, values[None, :, :stop]),
                    attn_mask=mask,
                    scale=scaling,
                )
            return output.transpose(1, 2)

        hidden = self._model.hidden(embeds[None], positions[None].to(self._model.device), attend)[0]
        return self._model.logits(hidden[torch.as_tensor(ends - 1, device=hidden.device)])

    @torch.inference_mode()
    def step(self, first: int, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """Appends one token to each of several adjacent slots; returns the next logits, shape (slots, vocabulary).

        Args:
            first: Index of the first slot.
            tokens: One token for each slot.
            positions: Position of each token: the slot's filled length; for a free slot, the last position of all.
        """
        count = len(tokens)
        self._read[:, first : first + count] = torch.from_numpy(np.stack([tokens, positions]))
        filled = int(positions[positions < self.capacity - 1].max(initial=0))
        length = min(self.capacity, -(-(filled + 1) // self._rounding) * self._rounding)
        if self._graphs and first == 0:
            # The graph also steps slots beyond `count`; those write to the position that no prompt uses.
            rounded = min(self.count, 1 << (count - 1).bit_length())
            self._positions[count:rounded] = self.capacity - 1
            return self._graphs.step(self, rounded, length)[:count]
        return self._forward(first, count, length)

    def _forward(self, first: int, count: int, length: int) -> torch.Tensor:
        """Runs one step over the slots' first positions, with the inputs in `_tokens` and `_positions`."""
        rows = self._rows[:count]
        slots = slice(first, first + count)
        positions = self._positions[slots]
        beyond = torch.arange(length, device=positions.device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=self._model.dtype, device=positions.device)
        mask = mask.masked_fill_(beyond, float("-inf"))[:, None, None]

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
        ) -> torch.Tensor:
            keys, values = self._keys[layer, slots], self._values[layer, slots]
            keys[rows, :, positions] = key[:, :, 0]
            values[rows, :, positions] = value[:, :, 0]
            # Query heads that share a key head are attended as if they were tokens: nothing is repeated in memory.
            grouped = query.reshape(count, self._model.heads, -1, self._model.head_size)
            output = functional.scaled_dot_product_attention(
                grouped, keys[:, :, :length], values[:, :, :length], attn_mask=mask, scale=scaling
            )
            return output.reshape(count, 1, -1, self._model.head_size)

        embeds = self._model.embed(self._tokens[slots])[:, None]
        return self._model.logits(self._model.hidden(embeds, positions[:, None], attend)[:, 0])


class _Graphs:
    """Captures decoding steps on a GPU as CUDA graphs and replays them, which saves launching many small kernels.

    A graph has a fixed shape, so the number of slots and the length are rounded up. Each graph is compared with the
    eager step once. If capturing fails or the result differs, all later steps are eager, after one warning.
    """

    _broken = False  # of the whole process: a failure on this machine would recur

    def __init__(self, model: LanguageModel, count: int) -> None:
        self._captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._logits = torch.empty(count, model.vocabulary, dtype=torch.float32, device=model.device)
        self._pool: Any = None

    # The slots are a parameter: an attribute would make a reference cycle, which keeps their memory until collection.
    def step(self, slots: Slots, count: int, length: int) -> torch.Tensor:
        """Returns the logits of the first slots, which are valid until the next step."""
        if _Graphs._broken:
            return slots._forward(0, count, length)
        if (count, length) not in self._captured:
            return self._capture(slots, count, length)
        self._captured[count, length].replay()
        return self._logits[:count]

    def _capture(self, slots: Slots, count: int, length: int) -> torch.Tensor:
        """Runs an eager step and captures its graph for the next time; returns the eager logits."""
        plain = slots._forward(0, count, length)  # also what capturing needs: everything is initialised
        captured = self._logits[:count]
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on using the device; torch allows but one capture in a process.
            with (
                _capturing,
                torch.cuda.graph(
                    graph, self._pool, _capture_stream(captured.device), capture_error_mode="thread_local"
                ),
            ):
                captured.copy_(slots._forward(0, count, length))
            graph.replay()
            self._pool = graph.pool()
            # NaN or infinity concerns a single prompt, and is the same in both.
            known = plain.isfinite()
            difference = torch.where(known, captured - plain, 0).abs().max()
            if not difference <= _GRAPH_TOLERANCE * torch.where(known, plain, 0).abs().max():
                raise RuntimeError(f"a captured step differs from the plain one by {float(difference):.3g}")
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _Graphs._broken = True
            _log.warning("CUDA graphs are not used, decoding steps are slower: %s", error)
        else:
            self._captured[count, length] = graph
        return plain


_capturing = threading.Lock()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns one stream per device; torch's default is one for all. Graphs that share memory must share it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _for_heads(query: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Repeats keys or values for the query heads that share them."""
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)
