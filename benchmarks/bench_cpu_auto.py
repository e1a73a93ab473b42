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

from paired import Found, compared, engine, repeats

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.evaluation.widen import widened
from vllm_eagle3.provenance import provenance

ROOT = Path(__file__).parents[1]
MODES = ("none", "auto", "auto-tree")
PAIRS = {
    "trees / chains": ("auto-tree", "auto"),
    "chains / none": ("auto", "none"),
    "trees / none": ("auto-tree", "none"),
}


def measure(settings: SweepSettings) -> Iterator[Found]:
    """After every repeat, all repeats so far of every mode and batch size."""
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "settings.json"
        file.write_text(settings.to_json(), encoding="utf-8")
        workers = []
        for mode in settings.modes:
            workers.append(engine(mode, mode, file))
            stack.callback(workers[-1].close)
        yield from repeats(workers, settings)


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
    for found in measure(settings):  # calls for other targets and batch sizes add to the file
        rows = [compared(size, found, PAIRS) for size in settings.batch_sizes]
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
