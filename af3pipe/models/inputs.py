"""The checkpoint's own processor, and what goes in and out: samples, prompts, decoding, replies."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import GenerationConfig

from af3pipe.models.engine import ModelError
from af3pipe.models.family import Checkpoint
from af3pipe.schemas import Decoding, Reason, Rejected, Reply, Stage, Task

hf: Any = transformers  # typed in parts only: strict mypy refuses to call the rest


class Windows(NamedTuple):
    """A segment as the audio encoder takes it.

    Attributes:
        features: Log-mel, float32, shape (windows, mel bins, frames of a full window).
        mask: 1 where a frame holds audio, shape (windows, frames of a full window).
        tokens: Audio tokens of each window, in order; none is 0.
    """

    features: torch.Tensor
    mask: torch.Tensor
    tokens: tuple[int, ...]


class Inputs:
    """The processor of a checkpoint, and what the engine needs of it.

    Windows that give no audio token are left out: only a last one of a few samples can be such. They add nothing
    to the prompt, and stock Music Flamingo raises on them (tests/models/test_parity.py).

    Attributes:
        checkpoint: Whose arithmetic is used.
        processor: The checkpoint's own.
    """

    def __init__(self, checkpoint: Checkpoint, processor: Any) -> None:
        self.checkpoint = checkpoint
        self.processor = processor
        self._strips_prefix = any(
            "strip_prefix" in inspect.signature(method).parameters
            for method in (processor.decode, processor.batch_decode)
        )

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> "Inputs":
        """Loads the processor.

        Raises:
            ModelError: It cannot be loaded here.
        """
        try:
            return cls(
                checkpoint, hf.AutoProcessor.from_pretrained(checkpoint.source, **revision_options(checkpoint))
            )
        except Exception as error:
            raise load_error(checkpoint, "its processor", error) from error

    @property
    def audio_token_id(self) -> int:
        """The placeholder that audio takes the place of."""
        return int(self.processor.audio_token_id)

    def check(self, samples: npt.NDArray[np.float32]) -> None:
        """Whether a segment fits the model: at least one audio token, and nothing that would be cut off.

        Raises:
            Rejected: `too_short`, `too_long`, or `decode_error` for samples that are no numbers: the model would
                answer those, too.
        """
        limits, n = self.checkpoint.limits, len(samples)
        if self.checkpoint.audio_tokens(n) == 0:
            detail = f"{n} samples give no audio token; the model needs at least {limits.min_samples}"
            raise Rejected(Stage.WINDOW, Reason.TOO_SHORT, detail)
        if n > limits.max_samples:
            detail = f"{n} samples are more than the {limits.max_samples} ({limits.max_s:g} s) the model takes"
            raise Rejected(Stage.WINDOW, Reason.TOO_LONG, detail)
        if not np.isfinite(samples).all():
            detail = f"{int((~np.isfinite(samples)).sum())} of {n} samples are not finite"
            raise Rejected(Stage.WINDOW, Reason.DECODE_ERROR, detail)

    def windows(self, samples: npt.NDArray[np.float32], device: str = "cpu") -> Windows:
        """Cuts a checked segment into windows and computes their log-mel features on `device`."""
        size = self.checkpoint.limits.window_samples
        tokens = self.checkpoint.window_tokens(len(samples))
        kept = [index for index, count in enumerate(tokens) if count]
        extracted = self.processor.feature_extractor(
            [samples[index * size : (index + 1) * size] for index in kept],
            sampling_rate=self.checkpoint.limits.sample_rate,
            return_attention_mask=True,
            return_tensors="pt",
            device=device,
        )
        return Windows(
            extracted["input_features"], extracted["attention_mask"], tuple(tokens[index] for index in kept)
        )

    def prompt_ids(self, prompt: str, audio_tokens: int) -> torch.Tensor:
        """The whole conversation as token ids, the audio's placeholders written out; shape (length,).

        Equal to what the processor gives for a user turn with this text and an audio of so many tokens.

        Raises:
            Rejected: The prompt itself holds the placeholder, so that nobody could say where the audio goes.
        """
        processor = self.processor
        if processor.audio_token in prompt:
            detail = f"the prompt holds the model's audio placeholder {processor.audio_token!r}: {prompt[:200]!r}"
            raise Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, detail)
        text = processor.apply_chat_template(conversation(prompt), tokenize=False, add_generation_prompt=True)
        begin, end = (getattr(processor, f"audio_{edge}_token", "") for edge in ("bos", "eos"))
        text = text.replace(processor.audio_token, begin + processor.audio_token * audio_tokens + end)
        ids: torch.Tensor = processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
        return ids

    def reply(self, tokens: Sequence[int], ids: torch.Tensor, task: Task, released: GenerationConfig) -> Reply:
        """What the model said to a task.

        Args:
            tokens: The new tokens; what follows the reply's end, or the task's limit, is cut off.
            ids: The prompt, shape (length,).
            task: What was asked.
            released: The checkpoint's own config, for the tokens that end a reply.
        """
        ends = _eos_token_ids(released)
        tokens = tokens[: task.decoding.max_new_tokens]
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if end is None else tokens[: end + 1]
        options = {"strip_prefix": True} if task.strip_prefix and self._strips_prefix else {}
        texts = self.processor.batch_decode([list(tokens)], skip_special_tokens=True, **options)
        return Reply(
            text=texts[0].strip(),
            tokens=tuple(tokens),
            finish_reason="length" if end is None else "stop",
            audio_tokens=int((ids == self.audio_token_id).sum()),
            prompt_tokens=len(ids),
        )


def conversation(prompt: str, audio: npt.NDArray[np.float32] | None = None) -> list[dict[str, Any]]:
    """One user turn with text and audio, as chat templates take it; without samples, for its text alone."""
    sound = {"type": "audio"} if audio is None else {"type": "audio", "audio": audio}
    return [{"role": "user", "content": [{"type": "text", "text": prompt}, sound]}]


def generation_config(decoding: Decoding, released: GenerationConfig) -> GenerationConfig:
    """Everything that decides the next token, stated: what is left open, `generate` takes from the checkpoint.

    Args:
        decoding: What the task asks for.
        released: The checkpoint's own; only its special tokens are used.
    """
    sampling = {}
    if decoding.do_sample:
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    config: GenerationConfig = hf.GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=decoding.do_sample,
        num_beams=1,
        repetition_penalty=decoding.repetition_penalty,
        eos_token_id=released.eos_token_id,
        pad_token_id=released.pad_token_id,
        bos_token_id=released.bos_token_id,
        **sampling,
    )
    return config


def _eos_token_ids(released: GenerationConfig) -> tuple[int, ...]:
    """The checkpoint's end-of-sequence tokens; there may be several."""
    ids = released.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def revision_options(checkpoint: Checkpoint) -> dict[str, str]:
    """What pins `from_pretrained` to the commit the JSON files came from; nothing for a directory."""
    return {} if checkpoint.path else {"revision": checkpoint.revision}


def load_error(checkpoint: Checkpoint, part: str, error: Exception) -> ModelError:
    """One sentence about a part of a checkpoint that does not load."""
    reason = " ".join(str(error).split())[:500]
    return ModelError(
        f"model {checkpoint.model_id!r} at {checkpoint.revision}: {part} cannot be loaded from "
        f"{checkpoint.source} ({type(error).__name__}: {reason})"
    )
