"""Stage 1: teach the encoder words (CTC) and kinds of sound, before any language model sees it.

python pretrain_encoder.py --bank DIR --out encoder.pt
"""

import argparse

import numpy as np
import torch
from bank import load_bank
from batches import Mix, Sample, batches
from model import WIDTH, build_model, encode
from torch import nn
from torch.nn import functional
from training import (
    Optimizer,
    Progress,
    Schedule,
    add_bf16,
    autocast,
    ctc_head,
    ctc_loss,
    features,
    spoken,
    stage_parser,
    word_classes,
)
from vocabulary import MIX_PRETRAINING, SOUND_NAMES, SOUNDS

SCHEDULE = Schedule(peak=1e-3, warmup_steps=200, floor=2e-5)
BATCH_SECONDS = 110
SAVE_EVERY = 300


def sound_loss(head: nn.Linear, hidden: torch.Tensor, tokens: torch.Tensor, batch: list[Sample]) -> torch.Tensor:
    """Return the cross-entropy of the kind of sound, from the mean of the valid hidden states."""
    inside = torch.arange(hidden.shape[1])[None] < tokens[:, None]
    mean = (hidden * inside[..., None]).sum(1) / inside.sum(1)[:, None].clamp(min=1)
    wanted = torch.tensor([SOUND_NAMES.index(SOUNDS[sample.scene.kind]) for sample in batch])
    return functional.cross_entropy(head(mean), wanted)


@torch.no_grad()
def share_exact(head: nn.Linear, hidden: torch.Tensor, tokens: torch.Tensor, batch: list[Sample]) -> float:
    """Return the share of spoken rows whose greedy CTC reading is right."""
    rows = spoken(batch, tokens)
    right = 0
    for row in rows:
        best = head(hidden[row, : int(tokens[row])]).argmax(-1).tolist()
        read = [now for before, now in zip([0, *best], best, strict=False) if now and now != before]
        right += read == word_classes(batch[row])
    return right / len(rows) if rows else float(np.nan)


def follow_curriculum(mix: Mix, fraction: float) -> None:
    """Start with single clean words; go on to strings of six, mostly augmented."""
    mix.max_words = 1 if fraction < 0.2 else 2 if fraction < 0.35 else 6
    mix.clean = 0.8 if fraction < 0.3 else 0.3


def train(args: argparse.Namespace) -> None:
    model, _ = build_model()
    bank = load_bank(args.bank, args.hold_out)
    encoder, words, sounds = model.model.audio_tower, ctc_head(), nn.Linear(WIDTH, len(SOUND_NAMES))
    parameters = [*encoder.parameters(), *words.parameters(), *sounds.parameters()]
    optimizer = Optimizer((parameters, 1.0))
    mix = Mix(MIX_PRETRAINING, max_words=1, clean=0.8)
    samples = batches(5, bank, mix, BATCH_SECONDS)
    progress = Progress(args.minutes, args.report_every)

    def save_encoder() -> None:
        torch.save({"encoder": encoder.state_dict(), "words": words.state_dict()}, args.out)

    while (fraction := progress.fraction) < 1:
        follow_curriculum(mix, fraction)
        batch = next(samples)
        mel, valid = features(batch)
        with autocast(args.bf16):
            hidden, tokens = encode(model, mel, valid)
        hidden = hidden.float()
        sound = sound_loss(sounds, hidden, tokens, batch)
        word = ctc_loss(words, hidden, tokens, batch)
        values = {"ctc": word.item(), "sound": sound.item()}
        if progress.step % 20 == 0 and spoken(batch, tokens):
            values["exact"] = share_exact(words, hidden, tokens, batch)
        optimizer.step(word + 0.3 * sound, SCHEDULE.at(progress.step, fraction))
        progress.add(len(batch), **values)
        if progress.step % SAVE_EVERY == 0:
            save_encoder()
    save_encoder()
    progress.report()


def main() -> None:
    parser = stage_parser(__doc__.splitlines()[0], minutes=22, report_every=50)
    add_bf16(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    train(args)


if __name__ == "__main__":
    main()
