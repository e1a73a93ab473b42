"""Chains on a CPU in bf16: no speculation, vLLM's own eagle3 and this project's chain, each at its best K of 1 to 5.

The engines are measured in turn.

python benchmarks/bench_cpu_chain.py [--json benchmarks/results/cpu_chain.json]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.sweep.run import sweep
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.provenance import provenance

ROOT = Path(__file__).parents[1]


def best(results: list[dict[str, Any]], mode: str, size: int) -> dict[str, Any]:
    """The row of `mode` with the highest ratio to no speculation, which was measured in the same repeats."""
    rows = [row for row in results if row["mode"] == mode and row["batch_size"] == size]
    return max(rows, key=lambda row: row["ratio_to_none"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_chain.json")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="K")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    target, draft = default_pair()
    data = str(ROOT / "tests" / "data" / "prompts.jsonl")
    results: list[dict[str, Any]] = []
    for k in args.tokens:
        settings = SweepSettings(
            target=str(target),
            draft=str(draft),
            data=(data,),
            batch_sizes=tuple(args.batch_sizes),
            modes=("none", "native", "chain"),
            num_speculative_tokens=k,
            native_tokens=(k,),
            repeats=args.repeats,
            max_tokens=args.max_tokens,
        )
        print(f"== K = {k}")
        rows = [row for row in sweep(settings)["results"] if not row["mode"].startswith("native-")]
        results += [row | {"num_speculative_tokens": k} for row in rows]
        found = {
            "provenance": provenance([data], settings.public() | {"tokens": args.tokens}),
            "results": results,
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        "| batch | stock eagle3 / none (K) | vllm-eagle3 / none (K) | vllm-eagle3 / stock |\n| --- | --- | --- | --- |"
    )
    for size in args.batch_sizes:
        native, chain = best(results, "native", size), best(results, "chain", size)
        cells = [f"{row['ratio_to_none']:.2f} ({row['num_speculative_tokens']})" for row in (native, chain)]
        print(f"| {size} | {' | '.join(cells)} | {chain['ratio_to_none'] / native['ratio_to_none']:.2f} |")


if __name__ == "__main__":
    main()
