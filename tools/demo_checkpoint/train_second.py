"""Stages 3 and 4: go on from a checkpoint with harder samples, and with human digits if there are any.

python train_second.py --bank DIR --start first --out second
python train_second.py --bank DIR --start second --out third --humans RECORDINGS --minutes 34 --half
"""

import argparse
from pathlib import Path

import torch
from augment import mask_mel
from bank import add_humans, load_bank
from batches import Mix, batches
from model import freeze_positions, save
from training import (
    Optimizer,
    Progress,
    Schedule,
    ctc_head,
    ctc_loss,
    encode_batch,
    features,
    stage_parser,
    text_loss,
)
from transformers import AudioFlamingo3ForConditionalGeneration, AutoProcessor
from vocabulary import MIX_SECOND

BATCH_SECONDS = 90
SAVE_EVERY = 500
HEAD_ONLY_STEPS = 150  # the CTC head starts from random: it may not pull at the encoder yet
MASK_UNTIL = 0.93


def train(args: argparse.Namespace) -> None:
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.start)
    freeze_positions(model)
    bank = load_bank(args.bank, args.hold_out)
    if args.humans:
        add_humans(bank, args.humans)
    words = ctc_head()
    encoder = list(model.model.audio_tower.parameters())
    known = {id(parameter) for parameter in encoder}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    optimizer = Optimizer((encoder, 0.7), (words.parameters(), 2.0), (rest, 1.0))
    schedule = Schedule(peak=args.learning_rate, warmup_steps=200, floor=1e-5)
    samples = batches(77, bank, Mix(MIX_SECOND, hard=True), BATCH_SECONDS)
    progress = Progress(args.minutes, args.report_every)
    model.train()
    while (fraction := progress.fraction) < 1:
        batch = next(samples)
        mel, valid = features(batch)
        if fraction < MASK_UNTIL:
            mel = mask_mel(mel)
        hidden, audio, tokens = encode_batch(model, mel, valid)
        text = text_loss(model, processor.tokenizer, audio, tokens, batch)
        ctc = ctc_loss(words, hidden if progress.step > HEAD_ONLY_STEPS else hidden.detach(), tokens, batch)
        loss = text + ctc * (0.4 if fraction < 0.7 else 0.15)
        optimizer.step(loss, schedule.at(progress.step, fraction))
        progress.add(len(batch), text=text.item(), ctc=ctc.item())
        if progress.step % SAVE_EVERY == 0:
            save(model, processor, args.out)
    model.eval()
    save(model, processor, args.out, half=args.half)
    progress.report()


def main() -> None:
    parser = stage_parser(__doc__.splitlines()[0], minutes=70, report_every=100)
    parser.add_argument("--start", type=Path, required=True, help="the checkpoint to go on from")
    parser.add_argument("--humans", type=Path, help="folder of DIGIT_SPEAKER_TAKE.wav to mix in")
    parser.add_argument("--learning-rate", type=float, default=1.1e-3)
    parser.add_argument("--half", action="store_true", help="write the finished weights in float16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    train(args)


if __name__ == "__main__":
    main()
