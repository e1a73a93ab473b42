"""What this project's statistics cost a step, beyond vLLM's own, in the scheduler and in the front end.

python benchmarks/bench_metrics.py [--json FILE]          (no model; seconds)
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

from vllm_eagle3.provenance import provenance
from vllm_eagle3.runner.draft_scheduler import DraftScheduler
from vllm_eagle3.runner.hooks.spec_metrics import Eagle3Prom, Eagle3Stats

DRAFTS, REPEATS, STEPS = 5, 7, 400


def microseconds(function: Any) -> float:
    """Of one call: the median of REPEATS runs of STEPS calls."""
    runs = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(STEPS):
            function()
        runs.append((time.perf_counter() - start) / STEPS * 1e6)
    return statistics.median(runs)


def scheduler(batch: int) -> float:
    """Microseconds a step of `batch` requests that verify DRAFTS drafts each: counting, and filling the statistics."""
    sched: Any = object.__new__(DraftScheduler)
    sched._start_counting()
    names = [str(i) for i in range(batch)]
    step = SimpleNamespace(
        scheduled_spec_decode_tokens={name: [0] * DRAFTS for name in names},
        num_scheduled_tokens=dict.fromkeys(names, DRAFTS + 1),
    )
    output = SimpleNamespace(
        req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=[[1, 2, 3]] * batch
    )

    def ours() -> None:
        sched.cut_drafts(names, [DRAFTS] * batch)
        sched._steps["5"] += 1
        sched._seconds["5"] += 0.02
        sched._watch(step, output)
        stats = Eagle3Stats.new(DRAFTS)
        for _ in names:
            stats.observe_draft(DRAFTS, 2)

    def stock() -> None:
        stats = SpecDecodingStats.new(DRAFTS)
        for _ in names:
            stats.observe_draft(DRAFTS, 2)

    return microseconds(ours) - microseconds(stock)


def front_end(batch: int) -> float:
    """Microseconds a step in the process that serves HTTP."""

    def shown(cls: Any) -> Any:
        registry = prometheus_client.CollectorRegistry()
        made = type(
            "Prom", (cls,), {"_counter_cls": staticmethod(lambda **kw: counter(registry=registry, **kw))}
        )
        config = SimpleNamespace(method="eagle3", num_speculative_tokens=DRAFTS)
        return made(config, ["model_name", "engine"], {0: ["m", "0"]})

    counter = prometheus_client.Counter
    stats = Eagle3Stats.new(DRAFTS)
    for _ in range(batch):
        stats.observe_draft(DRAFTS, 2)
    stats.steps, stats.seconds = {"5": 1}, {"5": 0.02}
    ours, stock = shown(Eagle3Prom), shown(SpecDecodingProm)
    return microseconds(lambda: ours.observe(stats)) - microseconds(lambda: stock.observe(stats))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    results = []
    print(f"{'batch':>6} {'scheduler, us a step':>22} {'front end, us a step':>22}")
    for batch in (1, 8, 64):
        row = {"batch": batch, "scheduler_us": scheduler(batch), "front_end_us": front_end(batch)}
        results.append({key: round(value, 1) for key, value in row.items()})
        print(f"{batch:>6} {row['scheduler_us']:>22.1f} {row['front_end_us']:>22.1f}")
    if args.json is not None:
        found = {"provenance": provenance([], {"drafts": DRAFTS, "steps": STEPS}), "results": results}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
