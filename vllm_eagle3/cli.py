"""`vllm-eagle3 inspect | train | eval | sweep | doctor | fetch-demo`."""

import argparse
import sys
import traceback
from collections.abc import Sequence

from vllm_eagle3 import __version__, checkpoint, doctor
from vllm_eagle3.evaluation import cli as evaluation
from vllm_eagle3.evaluation import demo_models
from vllm_eagle3.evaluation.sweep import cli as sweep_cli
from vllm_eagle3.training import cli as training

# The exceptions that wrong input raises, here and in the libraries that this project calls. Others are defects.
MISTAKES = (ValueError, OSError, RuntimeError, FloatingPointError, ImportError)
EXIT_MISTAKE = 2


def parser() -> argparse.ArgumentParser:
    """Parser of all subcommands; each sets `func`, which returns the exit code."""
    root = argparse.ArgumentParser(prog="vllm-eagle3", description="EAGLE-3 for vLLM.")
    root.add_argument("--version", action="version", version=__version__)
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = root.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for room in (checkpoint, training, evaluation, sweep_cli, doctor, demo_models):
        room.add_parser(commands)
    for command in commands.choices.values():  # so that `vllm-eagle3 eval --debug` works as well
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code. A user's mistake prints one line to stderr and returns 2."""
    args = parser().parse_args(argv)
    try:
        return int(args.func(args) or 0)
    except KeyboardInterrupt:
        message = "interrupted"
    except MISTAKES as error:
        if args.debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
    sys.stderr.write(f"vllm-eagle3 {args.command}: {message}\n")
    return EXIT_MISTAKE


if __name__ == "__main__":
    sys.exit(main())
