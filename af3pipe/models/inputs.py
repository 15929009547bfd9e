"""Converts samples and prompts to model inputs, and generated tokens to replies, with the checkpoint's processor."""

import inspect
import itertools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import GenerationConfig

from af3pipe.models.decoding import cut_at_stop
from af3pipe.models.engine import ModelError
from af3pipe.models.family import Checkpoint
from af3pipe.schemas import Decoding, Reason, Rejected, Reply, Stage, Task, Turn

_SILENT_FRAMES = 8  # behind the audio: more than an STFT window and what the convolutions see
_MOST_TEMPLATES = 256

hf: Any = transformers  # typed in parts only: strict mypy refuses to call the rest


class Window(NamedTuple):
    """A window of audio as the encoder's input.

    Attributes:
        features: Log-mel, float32, shape (mel bins, frames and some of the silence behind them).
        frames: Number of frames that contain audio.
        full_frames: Number of frames of a full window.
        tokens: Number of audio tokens; never 0.
        place: Index of the window in its recording, from 0.
    """

    features: torch.Tensor
    frames: int
    full_frames: int
    tokens: int
    place: int


class Inputs:
    """The processor of a checkpoint, with the methods that the engine needs.

    Windows that give no audio token are skipped; only a last one of a few samples can be so short. They add nothing
    to the prompt, and the unmodified Music Flamingo raises on them (tests/models/test_parity.py).

    Attributes:
        checkpoint: The checkpoint, for the number of audio tokens.
        processor: The checkpoint's processor.
    """

    def __init__(self, checkpoint: Checkpoint, processor: Any) -> None:
        self.checkpoint = checkpoint
        self.processor = processor
        self._strips_prefix = any(
            "strip_prefix" in inspect.signature(method).parameters
            for method in (processor.decode, processor.batch_decode)
        )
        self._templates: dict[Any, npt.NDArray[np.int64]] = {}
        self._lock = threading.Lock()  # prompts are made on the callers' threads
        edges = [getattr(processor, f"audio_{edge}_token_id", None) for edge in ("bos", "eos")]
        self._audio_edges = [np.asarray([] if edge is None else [edge], dtype=np.int64) for edge in edges]

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> "Inputs":
        """Loads the processor.

        Raises:
            ModelError: The processor cannot be loaded here.
        """
        try:
            return cls(
                checkpoint, hf.AutoProcessor.from_pretrained(checkpoint.source, **revision_options(checkpoint))
            )
        except Exception as error:
            raise load_error(checkpoint, "its processor", error) from error

    @property
    def audio_token_id(self) -> int:
        """Id of the placeholder token for audio."""
        return int(self.processor.audio_token_id)

    def check(self, samples: npt.NDArray[np.float32]) -> None:
        """Raises Rejected for a segment that the model cannot process, or only in part.

        Raises:
            Rejected: `too_short`, `too_long`, or `decode_error` for samples that are NaN or infinite, for which
                the model would generate a reply, too.
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

    def windows(self, samples: npt.NDArray[np.float32], device: str = "cpu") -> list[Window]:
        """Cuts a checked segment into windows and computes their log-mel features on `device`.

        Equal to the processor's output, as far as there is audio: each frame is computed independently, and frames
        are scaled by their maximum, which silence does not raise.
        """
        limits, hop = self.checkpoint.limits, self.checkpoint.hop_length
        size = limits.window_samples
        windows = []
        for place, tokens in enumerate(self.checkpoint.window_tokens(len(samples))):
            if not tokens:
                continue
            piece = samples[place * size : (place + 1) * size]
            frames = -(-len(piece) // hop)
            # One window at a time: on a CPU twice as fast as many, which fall out of its cache.
            extracted = self.processor.feature_extractor(
                [piece],
                sampling_rate=limits.sample_rate,
                max_length=min(size, (frames + _SILENT_FRAMES) * hop),
                return_tensors="pt",
                device=device,
            )
            windows.append(Window(extracted["input_features"][0], frames, size // hop, tokens, place))
        return windows

    def prompt(
        self, turns: Sequence[Turn], replies: Sequence[str], audio_tokens: Sequence[int]
    ) -> npt.NDArray[np.int64]:
        """Tokenizes a conversation, up to where the next reply begins; shape (length,).

        A text token is its id. An audio placeholder is negative: -1 - i stands for embedding i of all the request's
        audio, so that equal numbers mean the same input. Otherwise equal to the processor's output for such turns.

        Args:
            turns: The user's turns.
            replies: The model's replies to all but the last of them.
            audio_tokens: Number of audio tokens of each of the request's audios.

        Raises:
            Rejected: A turn contains the placeholder as text, or refers to an audio that does not exist.
        """
        heard = heard_in(turns, len(audio_tokens))
        ids = self._template(
            tuple(zip((turn.prompt for turn in turns), map(len, heard), strict=True)), tuple(replies)
        )
        starts = np.cumsum([0, *audio_tokens])
        begin, end = self._audio_edges
        spans = [
            np.concatenate([begin, -1 - np.arange(starts[audio], starts[audio + 1]), end])
            for audios in heard
            for audio in audios
        ]
        places = np.flatnonzero(ids == self.audio_token_id)
        if len(places) < len(spans):
            # Chat templates write one placeholder per turn, however many audios it has: its audios follow each other.
            turned = [index for index, audios in enumerate(heard) for _ in audios]
            spans = [
                np.concatenate([span for span, turn in zip(spans, turned, strict=True) if turn == index])
                for index, audios in enumerate(heard)
                if audios
            ]
        if len(places) != len(spans):
            detail = f"the chat template writes {len(places)} audio placeholders for {len(spans)} audios"
            raise Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, detail)
        between = np.split(np.delete(ids, places), places - np.arange(len(places)))
        parts = [part for pair in zip(between, [*spans, ids[:0]], strict=True) for part in pair]
        return np.concatenate(parts)

    def ids(self, prompt: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns a prompt as the model's token ids, with its placeholder id for audio."""
        return np.where(prompt < 0, self.audio_token_id, prompt)

    def _template(self, turns: tuple[tuple[str, int], ...], replies: tuple[str, ...]) -> npt.NDArray[np.int64]:
        """Returns the token ids of a conversation, with one placeholder for each audio (or turn with audio)."""
        with self._lock:
            key = (turns, replies)
            if key not in self._templates:
                if len(self._templates) >= _MOST_TEMPLATES:
                    self._templates.clear()
                self._templates[key] = self._render(turns, replies)
            return self._templates[key]

    def _render(self, turns: tuple[tuple[str, int], ...], replies: tuple[str, ...]) -> npt.NDArray[np.int64]:
        processor = self.processor
        for prompt, _ in turns:
            if processor.audio_token in prompt:
                detail = f"the prompt has the model's audio placeholder {processor.audio_token!r}: {prompt[:200]!r}"
                raise Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, detail)
        messages = conversation([(prompt, [None] * audios) for prompt, audios in turns], replies)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return np.asarray(processor.tokenizer(text)["input_ids"], dtype=np.int64)

    def reply(self, tokens: Sequence[int], prompt: npt.NDArray[np.int64], task: Task, finish_reason: str) -> Reply:
        """Decodes the generated tokens into the reply to a task.

        Args:
            tokens: The generated tokens.
            prompt: The result of `prompt`.
            task: The task.
            finish_reason: `stop` or `length`.
        """
        options = {"strip_prefix": True} if task.strip_prefix and self._strips_prefix else {}
        texts = self.processor.batch_decode([list(tokens)], skip_special_tokens=True, **options)
        return Reply(
            text=cut_at_stop(texts[0], task.decoding.stop).strip(),
            tokens=tuple(tokens),
            finish_reason=finish_reason,
            audio_tokens=int((prompt < 0).sum()),
            prompt_tokens=len(prompt),
        )

    def said(self, reply: Reply) -> str:
        """Returns a reply as it appears in a conversation: verbatim, with the framing sentence."""
        text: str = self.processor.tokenizer.decode(list(reply.tokens), skip_special_tokens=True)
        return text


def conversation(
    turns: Sequence[tuple[str, Sequence[npt.NDArray[np.float32] | None]]], replies: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Builds a conversation in the format of chat templates.

    Args:
        turns: The user's turns, each with its text (unless empty) and its audio; without samples, for the text alone.
        replies: The model's replies to all but the last of them.
    """
    messages: list[dict[str, Any]] = []
    for (prompt, audios), reply in itertools.zip_longest(turns, replies):
        text = [{"type": "text", "text": prompt}] if prompt else []
        sounds = [{"type": "audio"} if audio is None else {"type": "audio", "audio": audio} for audio in audios]
        messages.append({"role": "user", "content": [*text, *sounds]})
        if reply is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    return messages


def heard_in(turns: Sequence[Turn], audios: int) -> list[tuple[int, ...]]:
    """Returns the indices of a request's audios in each turn of a conversation.

    Raises:
        Rejected: A turn refers to an audio that the request does not have.
    """
    every = tuple(range(audios))
    heard = [turn.audios if turn.audios is not None else () if place else every for place, turn in enumerate(turns)]
    for turn, places in zip(turns, heard, strict=True):
        if wrong := set(places) - set(every):
            detail = f"the turn {turn.prompt[:200]!r} refers to audio {min(wrong)}, but the request has {audios}"
            raise Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, detail)
    return heard


def generation_config(decoding: Decoding, released: GenerationConfig) -> GenerationConfig:
    """Returns a generation config that sets everything: for missing values, `generate` uses the checkpoint's.

    It excludes constraints and sampling, which `Chooser.generate_arguments` adds: sampling by `generate` itself
    depends on torch's global random state.

    Args:
        decoding: Decoding parameters of the task.
        released: The checkpoint's generation config; only its special tokens are used.
    """
    config: GenerationConfig = hf.GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=float(decoding.repetition_penalty),
        stop_strings=list(decoding.stop) or None,
        eos_token_id=released.eos_token_id,
        pad_token_id=released.pad_token_id,
        bos_token_id=released.bos_token_id,
    )
    return config


def eos_token_ids(released: GenerationConfig) -> tuple[int, ...]:
    """Returns the checkpoint's end-of-sequence tokens; there may be several."""
    ids = released.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def revision_options(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns arguments that pin `from_pretrained` to the commit of the JSON files; none for a directory."""
    return {} if checkpoint.path else {"revision": checkpoint.revision}


def load_error(checkpoint: Checkpoint, part: str, error: Exception) -> ModelError:
    """Returns the error for a part of a checkpoint that cannot be loaded, in one sentence."""
    reason = " ".join(str(error).split())[:500]
    return ModelError(
        f"model {checkpoint.model_id!r} at {checkpoint.revision}: {part} cannot be loaded from "
        f"{checkpoint.source} ({type(error).__name__}: {reason})"
    )
