"""Tokens/s of policy `auto` under different options of drafting, on a CPU, taking turns (bf16).

One process an engine. Within a repeat each batch size is measured on all engines, beginning with another one each time;
ratios are those of the runs of one repeat, over the first engine named. Runs of another temperature or batch size are
added to the file.

    python benchmarks/bench_cpu_options.py --engines none trees+grafts --temperature 1 --json FILE
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from paired import Found, compared, engine, repeats

from vllm_eagle3.config import TreeOptions
from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.provenance import provenance

ROOT = Path(__file__).parents[1]
GREEDY, DRAWN = {"draft_sampling": "greedy"}, {"draft_sampling": "auto"}
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> mode of the sweep and options
    "none": ("none", {}),
    "chains": ("auto", GREEDY),
    "drawn-chains": ("auto", DRAWN),
    "trees": ("auto-tree", GREEDY | {"graft": False}),
    "trees+grafts": ("auto-tree", GREEDY),
    "drawn-trees+grafts": ("auto-tree", DRAWN),
}


def measure(engines: list[str], settings: SweepSettings) -> Found:
    """Every repeat of every engine and batch size."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = []
        for name in engines:
            mode, options = ENGINES[name]
            file = folder / f"{name}.json"
            file.write_text(replace(settings, modes=(mode,), options=options).to_json(), encoding="utf-8")
            workers.append(engine(name, mode, file))
            stack.callback(workers[-1].close)
        *_, found = repeats(workers, settings)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["none", "drawn-trees+grafts"], choices=ENGINES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    target, draft = default_pair()
    data = str(ROOT / "tests" / "data" / "prompts.jsonl")
    settings = SweepSettings(
        target=str(target),
        draft=str(draft),
        data=(data,),
        batch_sizes=tuple(args.batch_sizes),
        modes=("none",),
        tree=TreeOptions(5, 4, 16),
        temperature=args.temperature,
        repeats=args.repeats,
        max_tokens=args.max_tokens,
    )
    made = provenance([data], settings.public() | {"modes": args.engines})
    found = measure(args.engines, settings)
    pairs = {name: (name, args.engines[0]) for name in args.engines[1:]}
    rows = [compared(size, found, pairs) for size in settings.batch_sizes]
    print(f"T = {args.temperature:g}; ratios to {args.engines[0]}, median and 95 % interval")
    print("| batch | engine | tokens/s | tau | ratio |\n| --- | --- | --- | --- | --- |")
    for r in rows:
        for name in args.engines:
            ratio = "1"
            if name in r["median"]:
                low, high = r["interval"][name]
                ratio = f"{r['median'][name]:.3f} ({low:.3f} to {high:.3f})"
            rate, tau = r["tokens_per_second"][name], r["tau"][name]
            print(f"| {r['batch_size']} | {name} | {rate:.1f} | {tau:.2f} | {ratio} |")
    if args.json:
        new = [
            r | {"temperature": args.temperature, "engines": args.engines, "provenance": made} for r in rows
        ]

        def key(result: dict[str, Any]) -> tuple[Any, ...]:
            return result["temperature"], result["batch_size"], tuple(result["engines"])

        old = json.loads(args.json.read_text(encoding="utf-8"))["results"] if args.json.is_file() else []
        kept = [result for result in old if key(result) not in {key(result) for result in new}]
        args.json.write_text(json.dumps({"results": kept + new}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
