"""Stage 2: teach the whole model to answer, from the pre-trained encoder.

python train_joint.py --bank DIR --encoder encoder.pt --out first
"""

import argparse
from pathlib import Path

import torch
from bank import load_bank
from batches import Mix, batches
from model import build_model, save
from training import (
    Optimizer,
    Progress,
    Schedule,
    add_bf16,
    ctc_head,
    ctc_loss,
    encode_batch,
    features,
    stage_parser,
    text_loss,
)
from vocabulary import MIX_JOINT

SCHEDULE = Schedule(peak=1.5e-3, warmup_steps=300, floor=1e-5)
BATCH_SECONDS = 90
SAVE_EVERY = 500


def train(args: argparse.Namespace) -> None:
    model, processor = build_model()
    words = ctc_head()
    if args.encoder:
        state = torch.load(args.encoder)
        model.model.audio_tower.load_state_dict(state["encoder"])
        words.load_state_dict(state["words"])
    bank = load_bank(args.bank, args.hold_out)
    encoder = list(model.model.audio_tower.parameters())
    known = {id(parameter) for parameter in encoder}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    optimizer = Optimizer((encoder, 0.35), ([*rest, *words.parameters()], 1.0))
    samples = batches(1, bank, Mix(MIX_JOINT, clean=0.25), BATCH_SECONDS)
    progress = Progress(args.minutes, args.report_every)
    model.train()
    while progress.fraction < 1:
        batch = next(samples)
        hidden, audio, tokens = encode_batch(model, *features(batch), bf16=args.bf16)
        text = text_loss(model, processor.tokenizer, audio, tokens, batch)
        ctc = ctc_loss(words, hidden, tokens, batch)
        fraction = progress.fraction
        loss = text + ctc * (0.6 if fraction < 0.6 else 0.2)
        optimizer.step(loss, SCHEDULE.at(progress.step, fraction))
        progress.add(len(batch), text=text.item(), ctc=ctc.item())
        if progress.step % SAVE_EVERY == 0:
            save(model, processor, args.out)
    model.eval()
    save(model, processor, args.out)
    progress.report()


def main() -> None:
    parser = stage_parser(__doc__.splitlines()[0], minutes=34, report_every=100)
    parser.add_argument("--encoder", type=Path, help="what pretrain_encoder.py wrote (default: random)")
    add_bf16(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    train(args)


if __name__ == "__main__":
    main()
