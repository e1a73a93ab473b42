"""`vllm-eagle3 inspect | train | eval | sweep | doctor`."""

import argparse
import sys
from collections.abc import Sequence

from vllm_eagle3 import __version__, checkpoint, doctor
from vllm_eagle3.evaluation import cli as evaluation
from vllm_eagle3.evaluation.sweep import cli as sweep_cli
from vllm_eagle3.training import cli as training


def parser() -> argparse.ArgumentParser:
    """Parser of all subcommands; each sets `func`, which returns the exit code."""
    root = argparse.ArgumentParser(prog="vllm-eagle3", description="EAGLE-3 for vLLM.")
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for room in (checkpoint, training, evaluation, sweep_cli, doctor):
        room.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit code."""
    args = parser().parse_args(argv)
    return int(args.func(args) or 0)


if __name__ == "__main__":
    sys.exit(main())
