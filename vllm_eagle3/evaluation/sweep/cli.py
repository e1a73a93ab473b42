"""`vllm-eagle3 sweep`: tokens/s of each mode at each batch size, compared with no speculation."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_eagle3.config import TreeOptions
from vllm_eagle3.evaluation.cli import add_widen, names, tree_shape
from vllm_eagle3.evaluation.model_shapes import SHAPES
from vllm_eagle3.evaluation.settings import DTYPES
from vllm_eagle3.evaluation.sweep.settings import MODES, SweepSettings
from vllm_eagle3.prompts import load_prompts
from vllm_eagle3.user_input import check_model, check_output_file, require_packages

DATA = Path(__file__).resolve().parents[3] / "tests" / "data" / "prompts.jsonl"
SYNTHETIC = (
    "NOTE: SYNTHETIC ACCEPTANCE, random weights. Whether a draft is accepted is drawn from the given rates: "
    "the throughput is that of the shape, the acceptance is an assumption."
)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def rates(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def add_parser(subparsers: Any) -> None:
    """Add the command `sweep`."""
    parser = subparsers.add_parser(
        "sweep",
        help="tokens/s by batch size",
        description=__doc__,
        epilog="modes: " + "; ".join(f"{mode}: {text}" for mode, text in MODES.items()),
    )
    add_arguments(parser)
    parser.set_defaults(func=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a sweep."""
    fields = SweepSettings.__dataclass_fields__
    parser.add_argument("--target", help="directory or name (default: the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--draft", help="directory or name (default: the embedded draft)")
    add_widen(parser)
    parser.add_argument(
        "--data", nargs="+", default=[str(DATA)], metavar="FILE", help="prompts (default: the repository's)"
    )
    for name, kind, text in (
        ("batch_sizes", numbers, "requests at a time, comma-separated"),
        ("modes", names, "comma-separated"),
        ("num_speculative_tokens", int, "drafts per step of chain; the most drafts per step of auto"),
        ("native_tokens", numbers, "numbers of drafts per step that native is measured with"),
        ("tree", tree_shape, "DEPTH,TOPK,NODES of the tree"),
        ("temperature", float, "0: greedy"),
        ("repeats", int, "measurements of each mode and batch size, after a warm-up"),
        ("max_tokens", int, "longest answer; a measurement is this many tokens per concurrent request"),
        ("max_model_len", int, "longest prompt and answer, tokens"),
        ("acceptance_rates", rates, "with --shape: share of steps that accept the n-th draft (cumulative)"),
    ):
        default = fields[name].default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        if isinstance(default, TreeOptions):
            shown = f"{default.depth},{default.topk},{default.nodes}"
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=default, help=f"{text} (default: {shown})")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the target's own")
    parser.add_argument("--enforce-eager", action="store_true", help="no torch.compile")
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights of this shape, SYNTHETIC acceptance; needs no weights"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check that everything works here, with shape tiny and two short repeats at two batch sizes",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write provenance and results")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the ratios")


def settings_of(arguments: argparse.Namespace) -> SweepSettings:
    """The settings that the options describe. Raises ValueError for a bad value.

    A dry run on a CPU has no synthetic acceptance, because vLLM's CPU sampler does not support it. Its figures have no
    meaning.
    """
    import torch

    from vllm_eagle3.evaluation.demo_models import default_draft, default_target
    from vllm_eagle3.evaluation.widen import widened

    if arguments.dry_run:
        arguments.shape, arguments.repeats, arguments.max_tokens = "tiny", 2, 8
        arguments.dtype, arguments.enforce_eager = "float32", True
        if not torch.cuda.is_available():
            arguments.acceptance_rates = ()
        arguments.batch_sizes, arguments.native_tokens = (
            arguments.batch_sizes[:2],
            arguments.native_tokens[:1],
        )
    fields = {
        name: getattr(arguments, name) for name in SweepSettings.__dataclass_fields__ if name != "options"
    }
    fields["data"] = tuple(arguments.data)
    for name in ("target", "draft"):
        fields[name] = fields[name] or (f"shape {arguments.shape}" if arguments.shape else "")
    settings = SweepSettings(**fields)
    for path in settings.data:
        load_prompts(path)
    target = settings.target or str(default_target())  # after the checks, because it may have to be fetched
    if arguments.widen is not None:
        if arguments.shape:
            raise ValueError("--widen: expected no --shape with it, because a shape has its own size")
        target = str(widened(target, arguments.widen))
    return replace(
        settings,
        target=target,
        draft=settings.draft or str(default_draft()),
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse files that cannot be written, paths that are not models, and a figure without matplotlib."""
    check_output_file(arguments.json, "--json")
    check_output_file(arguments.plot, "--plot")
    if arguments.plot:
        require_packages(["matplotlib"], "--plot", "eval")
    for option in ("target", "draft"):
        if getattr(arguments, option):
            check_model(getattr(arguments, option), f"--{option}")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the requested files, and return 0.

    Raises:
        ValueError: an option or a prompt is wrong.
        RuntimeError: an engine failed.
    """
    from vllm_eagle3.evaluation.sweep.report import plot, table
    from vllm_eagle3.evaluation.sweep.run import sweep

    def save(result: dict[str, Any]) -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    check(arguments)
    settings = settings_of(arguments)
    synthetic = settings.shape is not None
    if synthetic:
        sys.stderr.write(f"{SYNTHETIC}\n")
    result = sweep(settings, save)
    save(result)
    sys.stdout.write(table(result["results"], synthetic) + "\n")
    if synthetic:
        sys.stdout.write(f"\n{SYNTHETIC}\n")
    if arguments.plot:
        plot(result["results"], arguments.plot, synthetic)
    return 0
