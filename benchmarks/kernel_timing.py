"""Shared by the kernel benchmarks: shapes, timing, roofline, provenance and the command line.

On CUDA a variant is captured in a CUDA graph that uses copies of its inputs in turn, which together are larger than
L2, and replays are timed with events. On a CPU the variants are timed in turn, so that a change of the machine's load
affects all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_eagle3.provenance import provenance

Variant = Callable[[int], object]  # called with the index of the copy of the inputs
Times = dict[str, float]  # microseconds per call: "median", "best"
ROWS = (1, 2, 4, 8, 16, 32, 56, 64, 256, 2048)
CPU_CACHE_BYTES = 64 << 20  # size of all copies on a CPU: larger than a core's share of L3


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a target and its EAGLE-3 draft."""

    name: str
    hidden: int
    target_hidden: int
    vocab: int
    draft_vocab: int
    layers: int
    kv_heads: int
    head_dim: int


MODELS = (
    ModelShape("SmolLM2-135M", 576, 576, 49152, 16384, 30, 3, 64),
    ModelShape("Llama-3.1-8B", 4096, 4096, 128256, 32000, 32, 8, 128),
    ModelShape("Qwen3-8B", 4096, 4096, 151936, 32000, 36, 8, 128),
    ModelShape("Llama-3.3-70B", 6144, 8192, 128256, 32000, 80, 8, 128),
)
TINY = ModelShape("tiny", 64, 96, 512, 128, 2, 2, 16)


@dataclass(frozen=True)
class Options:
    """Parsed command line."""

    device: str
    dtype: torch.dtype
    models: tuple[ModelShape, ...]
    rows: tuple[int, ...]
    seconds: float
    out: Path | None
    dry_run: bool


def parse(description: str, argv: Sequence[str] | None, rows: tuple[int, ...] = ROWS) -> Options:
    """The options of a benchmark. --dry-run takes a tiny shape and very short timings."""
    names = [m.name for m in MODELS]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--rows", nargs="+", type=int, default=list(rows))
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on a variant at one shape")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = (TINY,) if args.dry_run else tuple(m for m in MODELS if m.name in args.models)
    return Options(
        device=args.device,
        dtype=getattr(torch, args.dtype),
        models=models,
        rows=(1, 3) if args.dry_run else tuple(args.rows),
        seconds=0.01 if args.dry_run else args.seconds,
        out=args.out,
        dry_run=args.dry_run,
    )


def copies(device: str, bytes_each: int) -> int:
    """How many copies of the inputs are used in turn, so that no call finds its weights in a cache: 2 to 64."""
    cache = CPU_CACHE_BYTES
    if torch.device(device).type == "cuda":
        cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(2, -(-cache // max(bytes_each, 1))), 64)


def normal(*shape: int, like: Options, scale: float = 1.0) -> Tensor:
    """Random numbers of the options' dtype and device."""
    return (torch.randn(*shape, device=like.device) * scale).to(like.dtype)


def time_variants(variants: dict[str, Variant], num_copies: int, options: Options) -> dict[str, Times]:
    """Times by variant."""
    if torch.device(options.device).type == "cuda":
        return {name: _time_graph(call, num_copies, options) for name, call in variants.items()}
    clock = cpu_clock()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call(0)
    end, turn = time.perf_counter() + options.seconds * len(variants), 0
    while turn < 5 * len(variants) or time.perf_counter() < end:
        for name, call in variants.items():
            copy = turn % num_copies  # another copy in each call, so that no variant finds it in a cache
            start = clock()
            call(copy)
            samples[name].append((clock() - start) * 1e6)
            turn += 1
    return {name: _summary(s) for name, s in samples.items()}


def cpu_clock() -> Callable[[], float]:
    """The clock: with one thread its CPU time, which does not count waiting on a busy machine; else wall time."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _time_graph(call: Variant, num_copies: int, options: Options) -> Times:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile and warm up before the capture
        for i in range(num_copies):
            call(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_copies):
            call(i)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    samples: list[float] = []
    end = time.perf_counter() + options.seconds
    while len(samples) < 10 or time.perf_counter() < end:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / num_copies)
    return _summary(samples)


def _summary(samples: list[float]) -> Times:
    return {"median": round(statistics.median(samples), 2), "best": round(min(samples), 2)}


@dataclass(frozen=True)
class Roofline:
    """Measured limits of the device: bytes/s of a large copy, FLOP/s of a large matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def microseconds(self, num_bytes: float, flops: float) -> float:
        """The shortest possible time for this many bytes and operations."""
        return round(1e6 * max(num_bytes / self.bytes_per_s, flops / self.flops_per_s), 2)


def measure_roofline(options: Options) -> Roofline:
    """Copy 1 GiB (CUDA) or 256 MiB (CPU) and multiply square matrices in the benchmark's dtype."""
    cuda = torch.device(options.device).type == "cuda"
    size = (1 << 12) if options.dry_run else (1 << 30) if cuda else (1 << 28)
    side = 64 if options.dry_run else 8192 if cuda else 2048
    source = torch.empty(size, dtype=torch.uint8, device=options.device).fill_(1)
    target = torch.empty_like(source)
    a = normal(side, side, like=options)
    best = {
        name: times["best"] * 1e-6
        for name, times in time_variants(
            {"copy": lambda i: target.copy_(source), "product": lambda i: a @ a}, 1, options
        ).items()
    }
    return Roofline(2 * size / best["copy"], 2 * side**3 / best["product"])


def _settings(options: Options, inputs: str) -> dict[str, Any]:
    """The settings for a result's provenance; `inputs` describes the tensors that were timed."""
    cuda = torch.device(options.device).type == "cuda"
    return {
        "inputs": inputs,
        "device": options.device,
        "dtype": str(options.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": options.seconds,
        "rows": options.rows,
        "models": [asdict(m) for m in options.models],
        "clock": "CUDA graph replay" if cuda else cpu_clock().__name__,
    }


def write(results: list[dict[str, Any]], roofline: Roofline, options: Options, inputs: str) -> None:
    """Print a table, and write JSON to --out if it is given."""
    for row in results:
        times = "  ".join(f"{name} {t['median']:.1f} (best {t['best']:.1f})" for name, t in row["us"].items())
        print(f"{row['model']:>14} rows {row['rows']:>5}  roofline {row['roofline_us']:.1f}  {times}  [us]")
    if options.out is not None:
        report = {
            "provenance": provenance([], _settings(options, inputs)),
            "roofline": asdict(roofline),
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(
    bench: Callable[[ModelShape, int, Options, Roofline], dict[str, Any]],
    description: str | None,
    inputs: str,
    argv: Sequence[str] | None,
    rows: tuple[int, ...] = ROWS,
    cuda_only: str | None = None,
) -> None:
    """The command line of a benchmark: call `bench` for each requested model and number of rows.

    cuda_only: the reason why a real run needs a CUDA device, if it does; then raises SystemExit without one.
    """
    options = parse(description or "", argv, rows)
    if cuda_only and torch.device(options.device).type != "cuda" and not options.dry_run:
        raise SystemExit(f"this benchmark needs a CUDA device: {cuda_only}")
    roofline = measure_roofline(options)
    cases = [(model, n) for model in options.models for n in options.rows]
    results = [bench(model, n, options, roofline) for model, n in tqdm(cases, disable=options.dry_run)]
    write(results, roofline, options, inputs)
