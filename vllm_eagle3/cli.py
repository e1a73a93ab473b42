"""`vllm-eagle3 inspect | train | eval | sweep | chat | doctor | fetch-demo`."""

import argparse
import sys
from collections.abc import Sequence

from vllm_eagle3 import __version__, checkpoint, doctor
from vllm_eagle3.evaluation import chat, demo_models
from vllm_eagle3.evaluation import cli as evaluation
from vllm_eagle3.evaluation.guard import guarded
from vllm_eagle3.evaluation.sweep import cli as sweep_cli
from vllm_eagle3.training import cli as training


def parser() -> argparse.ArgumentParser:
    """Parser of all subcommands; each sets `func`, which returns the exit code."""
    root = argparse.ArgumentParser(prog="vllm-eagle3", description="EAGLE-3 for vLLM.")
    root.add_argument("--version", action="version", version=__version__)
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = root.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for room in (checkpoint, training, evaluation, sweep_cli, chat, doctor, demo_models):
        room.add_parser(commands)
    for command in commands.choices.values():  # so that `vllm-eagle3 eval --debug` works as well
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code. A user's mistake prints one line to stderr and returns 2."""
    args = parser().parse_args(argv)
    return guarded(lambda: args.func(args), args.command, args.debug)


if __name__ == "__main__":
    sys.exit(main())
