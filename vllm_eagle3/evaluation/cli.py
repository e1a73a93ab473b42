"""`vllm-eagle3 eval`: tau, n-alpha, speed-up and identity of a target and its draft on files of prompts."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_eagle3.config import DRAFT_SAMPLING, GraftOptions, TreeOptions
from vllm_eagle3.evaluation.settings import DTYPES, MODES, EvalSettings, load_tasks
from vllm_eagle3.user_input import check_model, check_output_file, require_packages

NOTE = (
    "tau: tokens per verification, with the target's own; nodes: drafted tokens per verification; n-alpha: "
    "acceptance of the n-th draft if all earlier ones were accepted; tokens/s: while decoding. With 16-bit "
    "numbers, rounding depends on the shape of a batch, and greedy answers may differ where two tokens are "
    "nearly equal: use --dtype float32 to test that answers are the same."
)


def tree_shape(text: str) -> TreeOptions:
    """DEPTH,TOPK,NODES."""
    try:
        depth, topk, nodes = (int(part) for part in text.split(","))
        return TreeOptions(depth, topk, nodes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected DEPTH,TOPK,NODES such as 6,10,60; found {text!r} ({error})"
        ) from None


def graft_shape(text: str) -> GraftOptions:
    """LENGTH,MIN_MATCH."""
    try:
        length, min_match = (int(part) for part in text.split(","))
        return GraftOptions(length, min_match)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected LENGTH,MIN_MATCH such as 8,2; found {text!r} ({error})"
        ) from None


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def add_widen(parser: argparse.ArgumentParser) -> None:
    """The option --widen, which several commands have."""
    parser.add_argument(
        "--widen",
        type=int,
        metavar="N",
        help="make the target's MLPs N times as wide: it costs as much as a larger model and writes the same text",
    )


def add_parser(subparsers: Any) -> None:
    """Adds the command `eval`."""
    parser = subparsers.add_parser(
        "eval",
        help="tau, n-alpha, tokens/s and identity of outputs",
        description=__doc__,
        epilog="modes: " + "; ".join(f"{mode}: {text}" for mode, text in MODES.items()),
    )
    defaults = EvalSettings.__dataclass_fields__
    parser.add_argument("--target", help="directory or name (default: the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--draft", help="directory or name (default: the embedded draft)")
    add_widen(parser)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="prompts, JSON lines with `turns`"
    )
    parser.add_argument(
        "--modes", type=names, default=defaults["modes"].default, help="comma-separated (none,native,chain)"
    )
    parser.add_argument(
        "--tree", type=tree_shape, default=TreeOptions(), metavar="DEPTH,TOPK,NODES", help="default: 6,10,60"
    )
    parser.add_argument(
        "--graft", type=graft_shape, default=GraftOptions(), metavar="LENGTH,MIN_MATCH", help="default: 8,2"
    )
    for name, kind, text in (
        ("num_speculative_tokens", int, "K, the chain's length"),
        ("temperature", float, "0: greedy"),
        ("batch_size", int, "answers at a time"),
        ("max_tokens", int, "new tokens per answer"),
        ("limit", int, "prompts per file"),
        ("max_model_len", int, "longest prompt and answer, tokens"),
    ):
        default = defaults[name].default
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--draft-sampling",
        choices=DRAFT_SAMPLING,
        default=defaults["draft_sampling"].default,
        help="the option of this name; reference decoders take the likeliest drafts (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the target's own")
    parser.add_argument("--enforce-eager", action="store_true", help="no torch.compile")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write provenance and results")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw tau, speed-up and n-alpha")
    parser.set_defaults(func=run)


def settings_of(arguments: argparse.Namespace) -> EvalSettings:
    """The settings that the options describe. The default models are fetched after all other checks.

    Raises:
        ValueError: an option has a bad value.
        RuntimeError: the default target could not be fetched.
    """
    from vllm_eagle3.evaluation.demo_models import default_draft, default_target
    from vllm_eagle3.evaluation.widen import widened

    check_output_file(arguments.json, "--json")
    check_output_file(arguments.plot, "--plot")
    if arguments.plot:
        require_packages(["matplotlib"], "--plot", "eval")
    fields = {name: getattr(arguments, name) for name in EvalSettings.__dataclass_fields__}
    fields |= {
        "data": tuple(arguments.data),
        "target": arguments.target or "",
        "draft": arguments.draft or "",
    }
    for option in ("target", "draft"):
        if fields[option]:
            check_model(fields[option], f"--{option}")
    settings = EvalSettings(**fields)
    load_tasks(settings)
    target = settings.target or str(default_target())
    return replace(
        settings,
        target=target if arguments.widen is None else str(widened(target, arguments.widen)),
        draft=settings.draft or str(default_draft()),
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the requested files, and return 0.

    Raises:
        ValueError: an option or a prompt is wrong.
        RuntimeError: an engine failed.
    """
    from vllm_eagle3.evaluation.evaluate import evaluate
    from vllm_eagle3.evaluation.report import plot, table

    result = evaluate(settings_of(arguments))
    sys.stdout.write(f"{table(result['results'])}\n{NOTE}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(result["results"], arguments.plot)
    return 0
