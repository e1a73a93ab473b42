"""`vllm-eagle3 train`: trains a draft on prompts or token rows, and writes it with its model card."""

from __future__ import annotations

import argparse
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_eagle3.log_files import log_file, quiet
from vllm_eagle3.training import recipe
from vllm_eagle3.training.options import add_options, options_of
from vllm_eagle3.training.settings import Answers, LossOptions, TrainJob, TrainSettings
from vllm_eagle3.user_input import (
    check_files,
    check_model,
    check_output_folder,
    read_json_object,
    require_packages,
)

logger = logging.getLogger(__name__)
EXAMPLE = "vllm-eagle3 train --target DIR --prompts prompts.jsonl --generate '--limit 300' --out runs/x"
GROUPS = {"job": TrainJob, "training-time test": LossOptions, "optimiser and run": TrainSettings}
NEEDED = ("matplotlib", "tensorboard")  # only installed with the extra [train]


def add_parser(subparsers: Any) -> None:
    """Add the subcommand. Nothing heavy is imported before the subcommand runs."""
    parser = subparsers.add_parser(
        "train", help="train an EAGLE-3 draft", description=__doc__, epilog=f"Example: {EXAMPLE}"
    )
    add_arguments(parser)
    parser.set_defaults(func=main)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run: its folders and inputs, then the options of the settings' dataclasses."""
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
    """The TrainJob of parsed arguments. Raises ValueError for a bad value, FileNotFoundError for a missing file."""
    path = recipe.find(args.recipe) if args.recipe else None
    given = {k: v for k, v in vars(args).items() if k in options_of(*GROUPS.values())}
    answers: tuple[Answers, ...] = ()
    if args.prompts:
        answers = (Answers(tuple(args.prompts), args.out / "answers", tuple(shlex.split(args.generate))),)
    folder = args.data_dir or (path.parent if path else Path())
    job = recipe.job_of(path, given, args.out, folder, answers)
    if args.source_licences:
        job = replace(job, source_licences=read_json_object(args.source_licences, "--source-licences"))
    return job


def check(job: TrainJob) -> None:
    """Refuse bad arguments before any work, instead of after it or with a library's error message."""
    check_model(job.target, "--target")
    if job.init_from is not None:
        check_model(str(job.init_from), "--init-from")
    check_output_folder(job.settings.out, "--out")
    check_files(job.data, "--data")
    for answers in job.answers:
        # Other values may be names of data sets.
        check_files(
            [path for path in answers.prompts if path.suffix in (".json", ".jsonl", ".gz")], "--prompts"
        )


def main(args: argparse.Namespace) -> int:
    """Train and return 0.

    Raises:
        ValueError: an option or a file is wrong.
        RuntimeError: the target could not answer the prompts.
        FloatingPointError: the loss is not finite.
    """
    require_packages(NEEDED, "train", "train")
    job = job_from(args)
    check(job)
    from vllm_eagle3.training.job import train_draft

    log = log_file("train")
    with quiet(log):
        logger.info("warnings and what libraries say: %s", log)
        head = train_draft(job)
        logger.info("draft and model card: %s", head)
    return 0
