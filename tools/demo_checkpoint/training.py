"""What the three training stages share: the time budget, the losses, one step of the whole model."""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from batches import Sample
from model import AFTER_QUESTION, BEFORE_AUDIO, WIDTH, encode, mel_features
from torch import nn
from torch.nn import functional
from transformers import AudioFlamingo3ForConditionalGeneration, PreTrainedTokenizerFast
from vocabulary import WORDS

IGNORED = -100  # a label that is not learnt


def stage_parser(description: str, minutes: float, report_every: int) -> argparse.ArgumentParser:
    """Return a parser with what every stage takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--bank", type=Path, required=True, help="folder written by bank.py")
    parser.add_argument("--out", type=Path, required=True, help="what this stage writes")
    parser.add_argument("--minutes", type=float, default=minutes, help=f"time to train (default: {minutes:g})")
    parser.add_argument("--hold-out", default="slt", help="flite voice kept for the evaluation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report-every", type=int, default=report_every, metavar="STEPS")
    return parser


def add_bf16(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="run the encoder in bfloat16: faster on a CPU with AMX, 70 times slower on any other",
    )


def autocast(bf16: bool) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


@dataclass(frozen=True)
class Schedule:
    """A learning rate that warms up by steps and falls by the share of the time that is used."""

    peak: float
    warmup_steps: int
    floor: float

    def at(self, step: int, fraction: float) -> float:
        """Return the rate for a step, `fraction` of the time into the stage."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1, fraction))
        return self.peak * min(1, (step + 1) / self.warmup_steps) * cosine + self.floor


class Progress:
    """Keeps the time budget, counts steps and samples, and prints the means of what it was told."""

    def __init__(self, minutes: float, report_every: int) -> None:
        self.step = 0
        self._samples = 0
        self._seconds = minutes * 60
        self._report_every = report_every
        self._values: dict[str, list[float]] = defaultdict(list)
        self._started = time.monotonic()

    @property
    def fraction(self) -> float:
        """The share of the time that is used; above 1 when it is over."""
        return (time.monotonic() - self._started) / self._seconds

    def add(self, samples: int, **values: float) -> None:
        """Count a step, and print now and then."""
        self.step += 1
        self._samples += samples
        for name, value in values.items():
            self._values[name].append(value)
        if self.step % self._report_every == 0:
            self.report()

    def report(self) -> None:
        elapsed = time.monotonic() - self._started
        means = " ".join(f"{k} {np.mean(v[-self._report_every :]):.3f}" for k, v in self._values.items())
        rate = self._samples / elapsed
        print(f"{elapsed:.0f}s step {self.step} samples {self._samples} {means} {rate:.1f}/s", flush=True)


def ctc_head() -> nn.Linear:
    """Return a layer that names the word of each audio token; class 0 is the blank."""
    return nn.Linear(WIDTH, len(WORDS) + 1)


def spoken(batch: list[Sample], tokens: torch.Tensor) -> list[int]:
    """Return the rows that hold speech, with more audio tokens than words."""
    return [
        row
        for row, sample in enumerate(batch)
        if sample.scene.kind == "speech" and len(sample.scene.words) < int(tokens[row])
    ]


def word_classes(sample: Sample) -> list[int]:
    """Return the words of a sample as CTC classes."""
    return [WORDS.index(word) + 1 for word in sample.scene.words]


def ctc_loss(head: nn.Linear, hidden: torch.Tensor, tokens: torch.Tensor, batch: list[Sample]) -> torch.Tensor:
    """Return the CTC loss of the words of the spoken rows; 0 if there are none."""
    rows = spoken(batch, tokens)
    if not rows:
        return torch.tensor(0.0)
    log_probs = functional.log_softmax(head(hidden[rows]), -1).transpose(0, 1)
    targets = [word_classes(batch[row]) for row in rows]
    return functional.ctc_loss(
        log_probs,
        torch.tensor([label for target in targets for label in target]),
        tokens[rows],
        torch.tensor([len(target) for target in targets]),
        zero_infinity=True,
    )


def text_loss(
    model: AudioFlamingo3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    audio: torch.Tensor,
    tokens: torch.Tensor,
    batch: list[Sample],
) -> torch.Tensor:
    """Return the cross-entropy of the answers, given audio embeddings and questions.

    Args:
        model: Its language model and head are run.
        tokenizer: Of the same checkpoint.
        audio: What the projector gave, float32 of shape (samples, audio tokens, WIDTH).
        tokens: The valid audio tokens of each sample.
        batch: The samples.
    """
    embed, before = model.get_input_embeddings(), tokenizer(BEFORE_AUDIO).input_ids
    embedded, labels = [], []
    for row, sample in enumerate(batch):
        count = int(tokens[row])
        question = tokenizer(sample.question + AFTER_QUESTION).input_ids
        answer = tokenizer(sample.answer + "<|im_end|>").input_ids
        parts = [embed(torch.tensor(before)), audio[row, :count], embed(torch.tensor(question + answer))]
        embedded.append(torch.cat(parts))
        labels.append(torch.tensor([IGNORED] * (len(before) + count + len(question)) + answer))
    inputs = nn.utils.rnn.pad_sequence(embedded, batch_first=True)
    wanted = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)[:, 1:]
    lengths = torch.tensor([len(sequence) for sequence in embedded])
    mask = (torch.arange(inputs.shape[1])[None] < lengths[:, None]).long()
    run = model.model.language_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    learnt = wanted != IGNORED
    logits = model.lm_head(run.last_hidden_state[:, :-1].float()[learnt])
    return functional.cross_entropy(logits, wanted[learnt])


def encode_batch(
    model: AudioFlamingo3ForConditionalGeneration,
    mel: torch.Tensor,
    valid: torch.Tensor,
    *,
    bf16: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the encoder's hidden states, the projected audio embeddings, and the valid tokens of each."""
    with autocast(bf16):
        hidden, tokens = encode(model, mel, valid)
        audio = model.model.multi_modal_projector(hidden)
    return hidden.float(), audio.float(), tokens


def features(batch: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mel features of a batch and the valid frames of each sample."""
    return mel_features([sample.pcm for sample in batch])


class Optimizer:
    """AdamW over groups of parameters, each with a scale on the common learning rate."""

    def __init__(self, *groups: tuple[Iterable[nn.Parameter], float]) -> None:
        kept = [([p for p in parameters if p.requires_grad], scale) for parameters, scale in groups]
        self._parameters = [parameter for parameters, _ in kept for parameter in parameters]
        self._adamw = torch.optim.AdamW(
            [{"params": parameters, "scale": scale} for parameters, scale in kept],
            lr=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """Go one step down a loss, with gradients clipped to norm 1."""
        for group in self._adamw.param_groups:
            group["lr"] = rate * group["scale"]
        self._adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adamw.step()
