"""Eight real prompts without and with EAGLE-3: texts, identity, tokens/s, speed-up, tau, acceptance by position.

python examples/quickstart.py [--json FILE]      exit code 1 if the greedy fp32 texts differ
"""

import argparse
import sys
from pathlib import Path

from vllm_eagle3.evaluation.cli import add_widen
from vllm_eagle3.evaluation.demo import DemoSettings, run
from vllm_eagle3.evaluation.guard import guarded


def main() -> int:
    """Run the demo; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--num-speculative-tokens", type=int, default=3, metavar="K")
    parser.add_argument("--repeats", type=int, default=3, help="paired timings (after a warm-up)")
    parser.add_argument("--max-tokens", type=int, default=64)
    add_widen(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    settings = DemoSettings(args.num_speculative_tokens, args.max_tokens, args.repeats, args.widen, args.json)
    return guarded(lambda: run(settings), "demo", args.debug)


if __name__ == "__main__":
    sys.exit(main())
