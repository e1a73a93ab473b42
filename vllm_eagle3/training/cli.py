"""`vllm-eagle3 train`: prompts or token rows in, a draft with its model card out."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_eagle3.training import recipe
from vllm_eagle3.training.options import add_options, options_of
from vllm_eagle3.training.settings import Answers, LossOptions, TrainJob, TrainSettings

logger = logging.getLogger(__name__)
EXAMPLE = "vllm-eagle3 train --target DIR --prompts prompts.jsonl --generate '--limit 300' --out runs/x"
GROUPS = {"job": TrainJob, "training-time test": LossOptions, "optimiser and run": TrainSettings}
NEEDED = ("matplotlib", "tensorboard")  # of the extra [train], beyond what the package itself needs


def add_parser(subparsers: Any) -> None:
    """Add the subcommand; nothing heavy is imported before it runs."""
    parser = subparsers.add_parser(
        "train", help="train an EAGLE-3 draft", description=__doc__, epilog=f"Example: {EXAMPLE}"
    )
    add_arguments(parser)
    parser.set_defaults(func=main)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run: where it is and what it reads, then those of the settings' dataclasses."""
    add = parser.add_argument
    add(
        "--recipe",
        help="TOML file of a run in stages, or its name in recipes/; options given here come first",
    )
    add("--out", required=True, type=Path, help="directory of the run; an interrupted run there is resumed")
    add(
        "--data-dir", type=Path, metavar="DIR", help="where a recipe's files lie (default: beside the recipe)"
    )
    add("--prompts", nargs="+", type=Path, metavar="FILE", help="prompts the target answers first")
    add("--generate", default="", metavar="OPTIONS", help="options for answering, as one string")
    add("--source-licences", type=Path, metavar="FILE", help="JSON: source -> licence, for the model card")
    for title, cls in GROUPS.items():
        add_options(parser.add_argument_group(title), cls)


def job_from(args: argparse.Namespace) -> TrainJob:
    """A TrainJob of parsed arguments. Raises ValueError or FileNotFoundError for values that make no sense."""
    path = recipe.find(args.recipe) if args.recipe else None
    given = {k: v for k, v in vars(args).items() if k in options_of(*GROUPS.values())}
    answers: tuple[Answers, ...] = ()
    if args.prompts:
        answers = (Answers(tuple(args.prompts), args.out / "answers", tuple(shlex.split(args.generate))),)
    folder = args.data_dir or (path.parent if path else Path())
    job = recipe.job_of(path, given, args.out, folder, answers)
    if args.source_licences:
        job = replace(job, source_licences=json.loads(args.source_licences.read_text()))
    return job


def main(args: argparse.Namespace) -> int:
    """Train; returns 0, or 2 after printing what was wrong with the input."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        logger.error("training needs %s: pip install 'vllm-eagle3[train]'", " and ".join(missing))
        return 2
    from vllm_eagle3.checkpoint import CheckpointError
    from vllm_eagle3.training.job import train_draft

    try:
        head = train_draft(job_from(args))
    except (ValueError, OSError, FloatingPointError, RuntimeError, CheckpointError) as error:
        logger.error("%s", error)
        return 2
    logger.info("draft and model card: %s", head)
    return 0
