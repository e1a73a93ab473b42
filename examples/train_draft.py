"""Trains an EAGLE-3 draft for your model on your prompts, in one call.

python examples/train_draft.py --target DIR --prompts prompts.jsonl --out runs/my-draft
"""

import argparse
import csv
import json
import logging
from pathlib import Path

from vllm_eagle3.training.job import train_draft
from vllm_eagle3.training.settings import Answers, LossOptions, TrainJob, TrainSettings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="directory or name of the target model")
    parser.add_argument(
        "--prompts", required=True, type=Path, help="JSONL with `turns`, or ShareGPT conversations"
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--conversations", type=int, default=150, help="number of prompts to answer (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")

    settings = TrainSettings(
        out=args.out,
        epochs=args.epochs,
        lr=1e-3,  # for a small target and little data; the paper's 5e-5 is for 8B models
        batch_tokens=1024,
        eval_every=25,
        loss=LossOptions(steps=3),
    )
    answering = ["--limit", str(args.conversations), "--max-tokens", "128", "--temperatures", "0"]
    answering += ["--enforce-eager"]
    job = TrainJob(
        target=args.target,
        settings=settings,
        answers=(Answers((args.prompts,), args.out / "answers", tuple(answering)),),
        draft_vocab_size=8192,
        fc_norm=True,
        features_dir=args.out / "features",
        device=args.device,
        validation_limit=24,
    )
    head = train_draft(job)
    with (args.out / "validation.csv").open() as lines:
        last = list(csv.DictReader(lines))[-1]
    alpha, tau = float(last["alpha_1"]), float(last["tau"])
    print(f"{head}: validation acceptance {alpha:.3f}, tokens per verification {tau:.2f}")
    config = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}
    print(f"serve it: vllm serve {args.target} --speculative-config '{json.dumps(config)}'")


if __name__ == "__main__":
    main()
