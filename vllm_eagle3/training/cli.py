"""`vllm-eagle3 train`: prompts or token rows in, a draft with its model card out."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from pathlib import Path
from typing import Any

EXAMPLE = "vllm-eagle3 train --target DIR --prompts prompts.jsonl --generate '--limit 300' --out runs/x"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand; nothing heavy is imported before it runs."""
    parser = subparsers.add_parser(
        "train", help="train an EAGLE-3 draft", description=__doc__, epilog=f"Example: {EXAMPLE}"
    )
    add_arguments(parser)
    parser.set_defaults(func=main)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", required=True, help="directory or name of the target model")
    add("--out", required=True, type=Path, help="directory of the run; an interrupted run there is resumed")
    add("--data", nargs="+", type=Path, default=[], metavar="FILE", help="token rows: .jsonl or .jsonl.gz")
    add(
        "--prompts", nargs="+", type=Path, default=[], metavar="FILE", help="prompts the target answers first"
    )
    add("--generate", default="", metavar="OPTIONS", help="options for answering, as one string")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=int, help="optimiser steps")
    length.add_argument("--epochs", type=float, help="passes over the data (default: 2)")
    draft = parser.add_argument_group("draft")
    add = draft.add_argument
    add(
        "--draft-vocab-size",
        type=int,
        default=8192,
        help="most frequent answer tokens (default: %(default)s)",
    )
    add("--aux-layers", help="states after k layers, as LOW,MID,HIGH (default: 2, n // 2, n - 3)")
    add(
        "--init",
        default="target",
        choices=("target", "random"),
        help="start of the layer (default: %(default)s)",
    )
    add("--init-from", type=Path, metavar="DIR", help="start from an exported draft instead")
    add("--fc-norm", action="store_true", help="norm each state before fc (EAGLE-3.1)")
    add("--norm-output", action="store_true", help="feed the normed output to the next step (EAGLE-3.1)")
    add("--norm-before-residual", action="store_true", help="the residual is the normed g")
    ttt = parser.add_argument_group("training-time test")
    add = ttt.add_argument
    add("--ttt-steps", type=int, default=7, help="simulated steps (default: %(default)s)")
    add("--step-decay", type=float, default=0.8, help="step j weighs decay^(j-1) (default: %(default)s)")
    add("--loss", default="soft_ce", choices=("soft_ce", "kl", "tv", "lk"), help="default: %(default)s")
    add(
        "--feature-loss",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="EAGLE-2's feature regression (default: 0)",
    )
    add(
        "--copy-loss",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="teach the heads of one key head to copy from the context (default: 0)",
    )
    add("--prompt-loss", action="store_true", help="learn from the prompts too, where answers are few")
    add("--recompute", action="store_true", help="gradient checkpointing of the simulated steps")
    fit = parser.add_argument_group("optimiser")
    add = fit.add_argument
    add(
        "--optimizer",
        default="adamw",
        choices=("adamw", "muon"),
        help="muon: for the matrices of the layer and fc (default: %(default)s)",
    )
    add(
        "--ema",
        type=float,
        default=0.0,
        metavar="DECAY",
        help="export a running average of the weights, e.g. 0.998 (default: 0, the last ones)",
    )
    add("--lr", type=float, default=5e-5, help="default: %(default)s; small targets bear 20 times that")
    add("--warmup-share", type=float, default=0.02, help="share of the steps (default: %(default)s)")
    add(
        "--decay-share",
        type=float,
        default=0.98,
        help="share of the steps, linear, at the end (default: %(default)s)",
    )
    add("--clip", type=float, default=0.5, help="gradient norm (default: %(default)s)")
    add(
        "--batch-tokens",
        type=int,
        default=4096,
        help="a batch, padded; longer documents go alone (default: %(default)s)",
    )
    add("--accumulate", type=int, default=1, help="batches a step (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--fp32", action="store_true", help="no bf16 autocast")
    run = parser.add_argument_group("run")
    add = run.add_argument
    add(
        "--validation-share",
        type=float,
        default=0.025,
        help="prompts held out, by hash (default: %(default)s)",
    )
    add("--validation-limit", type=int, default=128, help="documents validated on (default: %(default)s)")
    add("--limit", type=int, help="train on this many documents only")
    add("--features-dir", type=Path, help="keep the target's states on disk; the first epoch fills it")
    add("--eval-every", type=int, default=100, help="steps (default: %(default)s)")
    add("--save-every", type=int, default=100, help="steps (default: %(default)s)")
    add(
        "--patience",
        type=int,
        default=0,
        help="stop after this many validations without a better tau (0: never)",
    )
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of the target")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--speculators", action="store_true", help="export in the speculators form too")
    add("--licence", default="other", help="of the draft, for the model card")
    add("--source-licences", type=Path, metavar="FILE", help="JSON: source -> licence, for the model card")


def job_from(args: argparse.Namespace) -> Any:
    """A TrainJob of parsed arguments. Raises ValueError for values that make no sense."""
    import torch

    from vllm_eagle3.training.job import TrainJob
    from vllm_eagle3.training.trainer import TrainSettings
    from vllm_eagle3.training.ttt import LossOptions

    weights = args.feature_loss, args.copy_loss
    loss = LossOptions(args.ttt_steps, args.step_decay, args.loss, *weights, args.recompute)
    same = ["out", "lr", "warmup_share", "decay_share", "clip", "batch_tokens", "accumulate", "seed"]
    same += ["optimizer", "ema", "eval_every", "save_every", "patience"]
    settings = TrainSettings(
        **{name: getattr(args, name) for name in same},
        max_steps=args.max_steps,
        epochs=2.0 if args.epochs is None else args.epochs,
        loss=loss,
        autocast=not args.fp32,
    )
    switches = ("fc_norm", "norm_output", "norm_before_residual")
    same = [
        "target",
        "draft_vocab_size",
        "init",
        "init_from",
        "validation_share",
        "validation_limit",
        "limit",
        "prompt_loss",
    ]
    same += ["features_dir", "dtype", "licence"]
    return TrainJob(
        **{name: getattr(args, name) for name in same},
        settings=settings,
        data=tuple(args.data),
        prompts=tuple(args.prompts),
        generate_args=tuple(shlex.split(args.generate)),
        aux_layers=tuple(int(k) for k in args.aux_layers.split(",")) if args.aux_layers else None,
        source_licences=json.loads(args.source_licences.read_text()) if args.source_licences else {},
        options={name: True for name in switches if getattr(args, name)},
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def main(args: argparse.Namespace) -> int:
    """Train; returns 0, or 2 after printing what was wrong with the input."""
    from vllm_eagle3.checkpoint import CheckpointError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        from vllm_eagle3.training.job import train_draft

        head = train_draft(job_from(args), args.speculators)
    except (ValueError, OSError, FloatingPointError, RuntimeError, CheckpointError) as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    logging.getLogger(__name__).info("draft and model card: %s", head)
    return 0
