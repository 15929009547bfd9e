"""Encodes windows of audio with the checkpoint's encoder and projector, without padding them to 30 s.

The unmodified code pads every window to 30 s and masks the rest. Without the padding the embeddings are the same
(float32: 2e-6), and a clip of 2 s costs a fifteenth.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.musicflamingo import modeling_musicflamingo

from af3pipe.models.devices import is_out_of_memory
from af3pipe.models.inputs import Window

_rotate: Any = modeling_musicflamingo.apply_rotary_time_emb  # not typed

# Positions (of 20 ms) through the encoder at once: a CPU is fastest while a layer's values stay in its cache, a GPU
# while all of it is busy.
_POSITIONS = {"cpu": 1500, "cuda": 96_000}
# Windows of like length share a batch; on a GPU, where many small calls cost more than some padding, of nearly like.
_ROUNDING = {"cpu": 1, "cuda": 64}


class _Batch(NamedTuple):
    """Windows encoded together, and the length that each is padded to."""

    windows: list[Window]
    positions: int


class AudioEncoder:
    """The audio tower and the projector of a loaded model.

    Attributes:
        max_positions: Most positions to encode at once; halved when they do not fit in memory, and never raised
            again.
    """

    def __init__(self, core: Any, *, rounding: int | None = None) -> None:
        self._core = core
        self._tower = core.audio_tower
        self._device = next(self._tower.parameters()).device
        self._dtype = self._tower.conv1.weight.dtype
        self._rounding = rounding or _ROUNDING.get(self._device.type, 64)
        self.max_positions = _POSITIONS.get(self._device.type, 96_000)

    @torch.inference_mode()
    def encode(self, windows: Sequence[Window], between: Callable[[], None]) -> list[torch.Tensor]:
        """Encodes windows; returns the embeddings of each, in order, shape (audio tokens, LM hidden size).

        Args:
            windows: Windows of any recordings, in any order.
            between: Called before each batch; an exception from it ends the encoding.
        """
        by_length = sorted(range(len(windows)), key=lambda index: windows[index].frames)
        encoded: dict[int, torch.Tensor] = {}
        while by_length:
            between()
            batch = self._batch([windows[index] for index in by_length])
            try:
                embedded = self._embed(batch)
            except Exception as error:
                if not is_out_of_memory(error) or len(batch.windows) == 1:
                    raise
                self.max_positions = batch.positions * (len(batch.windows) // 2)
                continue
            now, by_length = by_length[: len(batch.windows)], by_length[len(batch.windows) :]
            encoded.update(zip(now, embedded, strict=True))
        return [encoded[index] for index in range(len(windows))]

    def _batch(self, windows: list[Window]) -> _Batch:
        """Takes the shortest of these windows, as many as have one rounded length and fit."""
        positions = self._rounded(windows[0])
        alike = next((n for n, other in enumerate(windows) if self._rounded(other) != positions), len(windows))
        return _Batch(windows[: max(1, min(alike, self.max_positions // positions))], positions)

    def _rounded(self, window: Window) -> int:
        """Returns the positions of a window, rounded up, but at most those of a full window."""
        most = _positions(window.full_frames)
        return min(most, -(-_positions(window.frames) // self._rounding) * self._rounding)

    def _embed(self, batch: _Batch) -> list[torch.Tensor]:
        tower, windows = self._tower, batch.windows
        # The last position looks at one mel frame more than its two, where the window has it: silence is not zero.
        frames = min(2 * batch.positions + 2, windows[0].full_frames)
        features = torch.stack([_fit(window.features, frames) for window in windows])
        hidden = functional.gelu(tower.conv1(features.to(self._device, self._dtype)))
        hidden = functional.gelu(tower.conv2(hidden[..., : 2 * batch.positions])).transpose(1, 2)
        hidden = hidden + tower.embed_positions.weight[: batch.positions]
        mask = self._mask(batch, hidden)
        for layer in tower.layers:
            hidden = layer(hidden, mask)
        hidden = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))
        if hasattr(self._core, "pos_emb"):
            hidden = self._with_times(hidden, windows)
        embedded = self._core.multi_modal_projector(hidden)
        # Copies: a view would keep the whole batch in memory for as long as one of its windows is needed.
        return [piece[: window.tokens].clone() for piece, window in zip(embedded, windows, strict=True)]

    def _mask(self, batch: _Batch, hidden: torch.Tensor) -> Any:
        """Returns the mask of the padding for the attention in use; None if there is none."""
        lengths = [_positions(window.frames) for window in batch.windows]
        if min(lengths) == batch.positions:
            return None
        ends = torch.tensor(lengths, device=self._device)
        audio = torch.arange(batch.positions, device=self._device) < ends[:, None]
        return create_bidirectional_mask(config=self._tower.config, inputs_embeds=hidden, attention_mask=audio)

    def _with_times(self, hidden: torch.Tensor, windows: Sequence[Window]) -> torch.Tensor:
        """Rotates Music Flamingo's embeddings by their times in the recording.

        The unmodified code derives the times from input_ids and the padded length, so this uses those of full
        windows, too; and float32 as there, for the same cosines.
        """
        full = _positions(windows[0].full_frames) // 2
        step = self._core.config.audio_frame_step * 4
        places = torch.tensor([window.place for window in windows], device=self._device)
        times = places[:, None] * full * step + torch.arange(full, device=self._device, dtype=torch.float32) * step
        cos, sin = self._core.pos_emb(times, seq_len=full)
        length = hidden.shape[1]
        turned: torch.Tensor = _rotate(hidden, cos[:, :length], sin[:, :length])
        return turned


def _fit(features: torch.Tensor, frames: int) -> torch.Tensor:
    """Cuts or pads features to this many mel frames; the padding is masked in everything that is kept."""
    return functional.pad(features[:, :frames], (0, max(0, frames - features.shape[1])))


def _positions(frames: int) -> int:
    """Returns the length after the second convolution, of stride 2, for a number of mel frames."""
    return (frames - 1) // 2 + 1
