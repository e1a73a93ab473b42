"""Throughput by batch size: no speculation, stock vLLM's eagle3, and this project's chain, tree and policy.

python examples/throughput_sweep.py --batch-sizes 1,2,4,8 --json sweep.json --plot sweep.png
"""

import argparse
import sys

from vllm_eagle3.evaluation.sweep import cli as sweep_cli

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sweep_cli.add_arguments(parser)
    sys.exit(sweep_cli.run(parser.parse_args()))
