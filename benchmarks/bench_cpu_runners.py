"""vLLM's two model runners on a CPU in bf16: V2 / V1, without speculation and with this project's chains.

Each engine has a process. In each repeat every batch size is measured on both; the runner that begins alternates.

python benchmarks/bench_cpu_runners.py [--modes none auto] [--json benchmarks/results/cpu_runners.json]
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from paired import engine, repeats

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.evaluation.sweep.worker import Measurement
from vllm_eagle3.provenance import provenance

ROOT = Path(__file__).parents[1]
RUNNERS = {"V1": "0", "V2": "1"}


def compare(mode: str, settings: SweepSettings) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of one mode after each repeat: one row per batch size, with the ratios of all repeats so far."""
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "settings.json"
        file.write_text(settings.to_json(), encoding="utf-8")
        workers = []
        for runner, asked in RUNNERS.items():
            workers.append(engine(runner, mode, file, asked))
            stack.callback(workers[-1].close)
        for found in repeats(workers, settings):
            yield [row(mode, size, found["V1", size], found["V2", size]) for size in settings.batch_sizes]


def row(mode: str, size: int, v1: list[Measurement], v2: list[Measurement]) -> dict[str, Any]:
    rates = [[run.tokens / run.seconds for run in runs] for runs in (v1, v2)]
    ratios = [b / a for a, b in zip(*rates, strict=True)]
    taus = [1 + sum(r.accepted for r in runs) / max(sum(r.drafts for r in runs), 1) for runs in (v1, v2)]
    return {
        "mode": mode,
        "batch_size": size,
        "v1_tokens_per_second": median(rates[0]),
        "v2_tokens_per_second": median(rates[1]),
        "v2_over_v1": median(ratios),
        "ratios": ratios,
        "tau": taus,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_runners.json")
    parser.add_argument("--modes", nargs="+", default=["none", "auto"], choices=["none", "chain", "auto"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    target, draft = default_pair()
    data = str(ROOT / "tests" / "data" / "prompts.jsonl")
    results: list[dict[str, Any]] = []
    if args.json.is_file():  # other modes may have been measured by other runs
        results = json.loads(args.json.read_text(encoding="utf-8"))["results"]
    print(
        "| mode | batch | V1 tokens/s | V2 tokens/s | V2 / V1 (median, range) |\n| --- | --- | --- | --- | --- |"
    )
    for mode in args.modes:
        settings = SweepSettings(
            target=str(target),
            draft=str(draft),
            data=(data,),
            batch_sizes=tuple(args.batch_sizes),
            modes=(mode,),
            repeats=args.repeats,
            max_tokens=args.max_tokens,
        )
        made = provenance([data], settings.public())
        others = [old for old in results if old["mode"] != mode]
        for rows in compare(mode, settings):
            results = others + [found | {"provenance": made} for found in rows]
            args.json.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")
        for found in rows:
            low, high = min(found["ratios"]), max(found["ratios"])
            rates = f"{found['v1_tokens_per_second']:.1f} | {found['v2_tokens_per_second']:.1f}"
            spread = f"{found['v2_over_v1']:.3f} ({low:.3f} to {high:.3f})"
            print(f"| {mode} | {found['batch_size']} | {rates} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
