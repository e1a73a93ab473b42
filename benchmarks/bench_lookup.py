"""Time of a graft: both forms of the look-up, and the merge into a tree, by batch size and length of the texts.

    OMP_NUM_THREADS=1 python benchmarks/bench_lookup.py --out benchmarks/results/lookup_cpu.json

Texts are random ids: "few" draws them from 50 ids, so that many places match a little, "many" from 5,000.
Variants are timed in turn, by the thread's CPU time on a CPU and by CUDA events elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_eagle3.provenance import provenance
from vllm_eagle3.tree.graft import graft
from vllm_eagle3.tree.lookup import MAX_MATCH, MIN_MATCH, look_up, look_up_scan

LENGTH, NODES = 8, 16
IDS = {"few": 50, "many": 5000}


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.thread_time()
        call()
        return (time.thread_time() - start) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def bench(
    batch: int, width: int, ids: int, repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median, lowest and highest microseconds of a call for the whole batch, by variant."""
    tokens = torch.randint(0, ids, (batch, width), dtype=torch.int32, device=device)
    ends = torch.full((batch,), width, device=device)
    tree = torch.randint(0, ids, (batch, NODES), device=device)
    parents = (torch.rand(batch, NODES, device=device) * torch.arange(1, NODES + 1, device=device)).long()
    continuation = torch.randint(0, ids, (batch, LENGTH), device=device)
    variants: dict[str, Callable[[], object]] = {
        "look_up": lambda: look_up(tokens, ends, LENGTH),
        "scan": lambda: look_up_scan(tokens, ends, LENGTH, MIN_MATCH, MAX_MATCH),
        "graft": lambda: graft(tree, parents, continuation, NODES + LENGTH),
    }
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 3):
        for name, call in variants.items():
            taken = microseconds(call, device)
            if turn >= 3:
                samples[name].append(taken)
    return {
        name: {
            "median": round(statistics.median(s), 1),
            "least": round(min(s), 1),
            "largest": round(max(s), 1),
        }
        for name, s in samples.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--widths", nargs="+", type=int, default=[2048, 32768])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, results = torch.device(options.device), list[dict[str, Any]]()
    for batch in options.batches:
        for width in options.widths:
            for name, ids in IDS.items():
                times = bench(batch, width, ids, options.repeats, device)
                results.append({"batch": batch, "tokens": width, "ids": name, "us": times})
                medians = "  ".join(f"{variant} {t['median']:.0f}" for variant, t in times.items())
                print(f"batch {batch:>3}  {width:>6} tokens, {name} ids: {medians}  us")
    if options.out:
        settings = {"device": options.device, "repeats": options.repeats, "length": LENGTH, "nodes": NODES}
        report = {"provenance": provenance([], settings), "results": results}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
