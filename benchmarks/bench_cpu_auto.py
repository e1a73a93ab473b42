"""Policy `auto` with trees and with chains, and no speculation, on Model Runner V2 on a CPU, taking turns (bf16).

One process an engine. Within a repeat each batch size is measured on all of them, beginning with another one each time.

    python benchmarks/bench_cpu_auto.py [--widen 6] [--batch-sizes 1 2 8] [--modes auto auto-tree] [--json FILE]
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.sweep.report import bootstrap_median
from vllm_eagle3.evaluation.sweep.run import Worker
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.evaluation.sweep.worker import Measurement
from vllm_eagle3.evaluation.widen import widened
from vllm_eagle3.provenance import provenance

ROOT = Path(__file__).parents[1]
MODES = ("none", "auto", "auto-tree")
PAIRS = {
    "trees / chains": ("auto-tree", "auto"),
    "chains / none": ("auto", "none"),
    "trees / none": ("auto-tree", "none"),
}


def measure(settings: SweepSettings) -> Iterator[dict[tuple[str, int], list[Measurement]]]:
    """After every repeat, all repeats so far of every mode and batch size."""
    found: dict[tuple[str, int], list[Measurement]] = {}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "settings.json"
        file.write_text(settings.to_json(), encoding="utf-8")
        workers = []
        for mode in settings.modes:
            native = {"VLLM_USE_V2_MODEL_RUNNER": "1", "EAGLE3_DISABLE": "0"}
            workers.append(Worker(mode, mode, file, native))
            stack.callback(workers[-1].close)
        for repeat in range(settings.repeats + 1):  # the first one warms up
            for size in settings.batch_sizes:
                turn = repeat % len(workers)
                for worker in workers[turn:] + workers[:turn]:
                    measured = worker.measure(size, repeat)
                    if repeat:
                        found.setdefault((worker.name, size), []).append(measured)
            if repeat:
                yield found


def row(size: int, found: dict[tuple[str, int], list[Measurement]]) -> dict[str, Any]:
    """Of one batch size: tokens/s and tokens a verification of each mode, and the ratios of every repeat."""
    runs = {mode: found[mode, size] for mode in MODES if (mode, size) in found}
    rates = {mode: [m.tokens / m.seconds for m in runs[mode]] for mode in runs}
    ratios = {
        name: [x / y for x, y in zip(rates[a], rates[b], strict=True)]
        for name, (a, b) in PAIRS.items()
        if a in runs and b in runs
    }
    return {
        "batch_size": size,
        "tokens_per_second": {mode: median(rates[mode]) for mode in runs},
        "tau": {
            mode: 1 + sum(m.accepted for m in runs[mode]) / max(sum(m.drafts for m in runs[mode]), 1)
            for mode in runs
        },
        "median": {name: median(values) for name, values in ratios.items()},
        "interval": {name: bootstrap_median(values) for name, values in ratios.items()},
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_auto.json")
    parser.add_argument("--widen", type=int, metavar="N", help="target with MLPs N times as wide")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 8, 32, 56])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    target, draft = default_pair()
    if args.widen:
        target = widened(target, args.widen)
    data = str(ROOT / "tests" / "data" / "prompts.jsonl")
    settings = SweepSettings(
        target=str(target),
        draft=str(draft),
        data=(data,),
        batch_sizes=tuple(args.batch_sizes),
        modes=tuple(args.modes),
        repeats=args.repeats,
        max_tokens=args.max_tokens,
    )
    made = provenance([data], settings.public() | {"widen": args.widen or 1})
    results = json.loads(args.json.read_text(encoding="utf-8"))["results"] if args.json.is_file() else []
    for found in measure(
        settings
    ):  # several calls, one for each target and some batch sizes, add up in a file
        rows = [row(size, found) for size in settings.batch_sizes]
        new = [r | {"widen": args.widen or 1, "provenance": made} for r in rows]
        keys = {(r["widen"], r["batch_size"]) for r in new}
        results = [r for r in results if (r["widen"], r["batch_size"]) not in keys] + new
        args.json.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")
    print(
        f"| batch | {', '.join(args.modes)}: tokens/s | ratios, medians with 95 % intervals |\n| --- | --- | --- |"
    )
    for r in rows:
        rates = ", ".join(f"{rate:.1f}" for rate in r["tokens_per_second"].values())
        ratios = [
            f"{n} {r['median'][n]:.3f} ({low:.3f} to {high:.3f})" for n, (low, high) in r["interval"].items()
        ]
        print(f"| {r['batch_size']} | {rates} | {', '.join(ratios)} |")


if __name__ == "__main__":
    main()
