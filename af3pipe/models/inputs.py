"""The checkpoint's own processor, and what goes in and out: samples, prompts, decoding, replies."""

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
    """A window as the audio encoder takes it.

    Attributes:
        features: Log-mel, float32, shape (mel bins, frames and some of the silence behind them).
        frames: That hold audio.
        full_frames: Of a full window.
        tokens: Audio tokens; never 0.
        place: In its recording, from 0.
    """

    features: torch.Tensor
    frames: int
    full_frames: int
    tokens: int
    place: int


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
        self._templates: dict[Any, npt.NDArray[np.int64]] = {}
        self._lock = threading.Lock()  # prompts are made on the callers' threads
        edges = [getattr(processor, f"audio_{edge}_token_id", None) for edge in ("bos", "eos")]
        self._audio_edges = [np.asarray([] if edge is None else [edge], dtype=np.int64) for edge in edges]

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

    def windows(self, samples: npt.NDArray[np.float32], device: str = "cpu") -> list[Window]:
        """Cuts a checked segment into windows and computes their log-mel features on `device`.

        Equal to what the stock processor gives, as far as there is audio: frames are computed each for itself, and
        what they are scaled by is their maximum, which silence does not raise.
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
        """A whole conversation as tokens, up to where the next reply begins; shape (length,).

        A text token is its id. A placeholder of audio is negative: -1 - i stands for embedding i of all the
        request's audio, so that equal numbers mean the same input. Otherwise equal to what the processor gives for
        such turns.

        Args:
            turns: What the user said.
            replies: What the model said to all but the last of them.
            audio_tokens: Of each of the request's audios.

        Raises:
            Rejected: A turn holds the placeholder as text, or hears what is not there.
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
            # Chat templates write one placeholder for a turn, whatever it holds: then its audios follow each other.
            turned = [index for index, audios in enumerate(heard) for _ in audios]
            spans = [
                np.concatenate([span for span, turn in zip(spans, turned, strict=True) if turn == index])
                for index, audios in enumerate(heard)
                if audios
            ]
        if len(places) != len(spans):
            detail = f"the chat template writes {len(places)} audio placeholders for {len(spans)} that are heard"
            raise Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, detail)
        between = np.split(np.delete(ids, places), places - np.arange(len(places)))
        parts = [part for pair in zip(between, [*spans, ids[:0]], strict=True) for part in pair]
        return np.concatenate(parts)

    def ids(self, prompt: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """A prompt as the model's own token ids, the placeholders as what they are."""
        return np.where(prompt < 0, self.audio_token_id, prompt)

    def _template(self, turns: tuple[tuple[str, int], ...], replies: tuple[str, ...]) -> npt.NDArray[np.int64]:
        """Token ids of a conversation, one placeholder for each audio (or turn that has some)."""
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
                detail = f"the prompt holds the model's audio placeholder {processor.audio_token!r}: {prompt[:200]!r}"
                raise Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, detail)
        messages = conversation([(prompt, [None] * audios) for prompt, audios in turns], replies)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return np.asarray(processor.tokenizer(text)["input_ids"], dtype=np.int64)

    def reply(self, tokens: Sequence[int], prompt: npt.NDArray[np.int64], task: Task, finish_reason: str) -> Reply:
        """What the model said to a task.

        Args:
            tokens: The new tokens.
            prompt: As `prompt` gave it.
            task: What was asked.
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
        """A reply as it stands in a conversation: as the model gave it, framing and all."""
        text: str = self.processor.tokenizer.decode(list(reply.tokens), skip_special_tokens=True)
        return text


def conversation(
    turns: Sequence[tuple[str, Sequence[npt.NDArray[np.float32] | None]]], replies: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A conversation as chat templates take it.

    Args:
        turns: The user's, each a text (none where it is empty) and its audio; without samples, for the text alone.
        replies: The model's to all but the last of them.
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
    """Which of a request's audios each turn of a conversation holds.

    Raises:
        Rejected: One that the request does not have.
    """
    every = tuple(range(audios))
    heard = [turn.audios if turn.audios is not None else () if place else every for place, turn in enumerate(turns)]
    for turn, places in zip(turns, heard, strict=True):
        if wrong := set(places) - set(every):
            detail = f"the turn {turn.prompt[:200]!r} hears audio {min(wrong)}, but the request has {audios}"
            raise Rejected(Stage.GENERATE, Reason.ENGINE_ERROR, detail)
    return heard


def generation_config(decoding: Decoding, released: GenerationConfig) -> GenerationConfig:
    """Everything that decides the next token, stated: what is left open, `generate` takes from the checkpoint.

    But for constraints and draws, which `Chooser.generate_arguments` adds: sampling by `generate` itself depends on
    whatever torch drew before.

    Args:
        decoding: What the task asks for.
        released: The checkpoint's own; only its special tokens are used.
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
