"""The draft phase inside an engine with K = 4: `propose` of this project's proposer and of vLLM's own.

The weights are random in a real model's shape, and only decoding steps of full batches count. On a GPU this times the
V2 runner and its CUDA graphs with events on the stream; on a CPU it times the V1 runner by the clock. Each side has a
process.

    python benchmarks/bench_draft_phase.py --out benchmarks/results/draft_phase_<device>.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_eagle3.evaluation.evaluate import environment
from vllm_eagle3.evaluation.model_shapes import SHAPES, write_shape
from vllm_eagle3.provenance import provenance
from vllm_eagle3.runner.engine_memory import memory_arguments

DRAFTS, TARGET = 4, 1.15  # vLLM's time / this project's is to be at least this
WARM_UP = 10  # decoding steps before the timed ones
SIDES = {"ours": "chain", "stock": "native"}  # with the mode whose environment each side uses


class Stopwatch:
    """Wraps a proposer's `propose` and keeps the time of each call."""

    def __init__(self, propose: Callable[..., Any]) -> None:
        self.propose, self.marks = propose, list[tuple[Any, Any]]()
        self.cuda = torch.cuda.is_available()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = self._mark()
        drafts = self.propose(*args, **kwargs)
        self.marks.append((start, self._mark()))
        return drafts

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> list[float]:
        """The times of all calls since the last call of this method."""
        marks, self.marks = self.marks, []
        if not self.cuda:
            return [1e3 * (stop - start) for start, stop in marks]
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in marks]


def start_stopwatch(worker: Any) -> tuple[Stopwatch, str]:
    """Wrap the worker's proposer in a stopwatch. Returns the stopwatch and the name of the proposer's class."""
    runner = worker.model_runner
    proposer = runner.speculator if hasattr(runner, "speculator") else runner.drafter
    watch = proposer.propose = Stopwatch(proposer.propose)
    return watch, f"{type(proposer).__module__}.{type(proposer).__qualname__}"


def measure(
    shape: str, batch_sizes: list[int], prompt_tokens: int, steps: int, eager: bool
) -> dict[str, Any]:
    """{"proposer", "cudagraph_mode", "ms": {batch size: times of `steps` decoding steps}} of an engine started here."""
    most = prompt_tokens + (steps + WARM_UP + 20) * (DRAFTS + 1)
    llm = start_engine(shape, batch_sizes, most, eager)
    [(watch, proposer)] = llm.collective_rpc(start_stopwatch)
    vocab = SHAPES[shape][0]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    times = {}
    for size in batch_sizes:
        prompts = torch.randint(2, vocab, (size, prompt_tokens), generator=generator).tolist()
        times[str(size)] = time_batch(llm.llm_engine, watch, prompts, steps, most - prompt_tokens)
    mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    return {"proposer": proposer, "cudagraph_mode": str(mode), "ms": times}


def start_engine(shape: str, batch_sizes: list[int], max_model_len: int, eager: bool) -> Any:
    """An engine with random weights of `shape` and a draft for it."""
    from vllm import LLM

    # Both sides get the same CUDA graphs. vLLM's own sizes would end at fewer requests.
    graphs = (
        {} if eager else {"cudagraph_capture_sizes": sorted({(DRAFTS + 1) * size for size in batch_sizes})}
    )
    dtype = "float32" if eager else "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        target, draft = write_shape(shape, Path(folder))
        return LLM(
            str(target),
            speculative_config={"method": "eagle3", "model": str(draft), "num_speculative_tokens": DRAFTS},
            additional_config={"eagle3": {"policy": "fixed"}},
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max(batch_sizes),
            enforce_eager=eager,
            compilation_config=graphs,
            enable_prefix_caching=False,
            seed=0,
            **memory_arguments(
                target,
                draft,
                batch_size=max(batch_sizes),
                max_model_len=max_model_len,
                drafts=DRAFTS,
                dtype=dtype,
            ),
        )


def time_batch(
    engine: Any, watch: Stopwatch, prompts: list[list[int]], steps: int, max_tokens: int
) -> list[float]:
    """Milliseconds of the draft phase in `steps` decoding steps of these prompts together."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    requests = [f"{len(prompts)}/{i}" for i in range(len(prompts))]
    for request, ids in zip(requests, prompts, strict=True):
        engine.add_request(request, tokens_input(ids), params)
    waiting = set(requests)
    while waiting:  # until every prompt is read
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    watch.milliseconds()
    while len(watch.marks) < WARM_UP + steps:
        if any(output.finished for output in engine.step()):
            raise RuntimeError(
                f"batch {len(prompts)}: a request ended before {steps} decoding steps were seen"
            )
    times = watch.milliseconds()[WARM_UP:]
    engine.abort_request(requests)
    while engine.has_unfinished_requests():
        engine.step()
    watch.milliseconds()
    return times


def run_side(side: str, arguments: list[str]) -> dict[str, Any]:
    """`measure` in a separate process. Raises RuntimeError if it fails; its messages are on stderr."""
    env = environment(SIDES[side]) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if torch.cuda.is_available():
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "side.json"
        command = [sys.executable, __file__, *arguments, "--side", side, "--out", str(out)]
        done = subprocess.run(command, env=env, check=False)
        if done.returncode:
            raise RuntimeError(f"{side}: the engine failed with exit code {done.returncode}; see above")
        return json.loads(out.read_text(encoding="utf-8"))


def result_rows(sides: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per batch size: medians in milliseconds, and vLLM's time divided by this project's."""
    rows = []
    for size, ours in sides["ours"]["ms"].items():
        stock = sides["stock"]["ms"][size]
        ms = {"ours": statistics.median(ours), "stock": statistics.median(stock)}
        ratio = ms["stock"] / ms["ours"]
        best = {"ours": min(ours), "stock": min(stock)}
        rows.append(
            {
                "batch_size": int(size),
                "steps": len(ours),
                **{f"ms_{side}": round(value, 4) for side, value in ms.items()},
                **{f"best_ms_{side}": round(value, 4) for side, value in best.items()},
                "ratio": round(ratio, 3),
                "target": TARGET,
                "met": ratio >= TARGET,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100, help="decoding steps that count")
    parser.add_argument("--dry-run", action="store_true", help="tiny shape, a few eager steps")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.shape, args.batch_sizes, args.prompt_tokens, args.steps = "tiny", [1, 3], 16, 5
    if args.side:
        found = measure(args.shape, args.batch_sizes, args.prompt_tokens, args.steps, args.dry_run)
        args.out.write_text(json.dumps(found), encoding="utf-8")
        return
    settings = {name: getattr(args, name) for name in ("shape", "batch_sizes", "prompt_tokens", "steps")}
    settings |= {"num_speculative_tokens": DRAFTS, "warm_up": WARM_UP, "weights": "random"}
    made = provenance([], settings | {"clock": "CUDA events" if torch.cuda.is_available() else "wall"})
    arguments = [
        "--shape",
        args.shape,
        "--prompt-tokens",
        str(args.prompt_tokens),
        "--steps",
        str(args.steps),
    ]
    arguments += ["--batch-sizes", *map(str, args.batch_sizes), *(["--dry-run"] if args.dry_run else [])]
    sides = {side: run_side(side, arguments) for side in SIDES}
    results = result_rows(sides)
    engines = {
        side: {name: found[name] for name in ("proposer", "cudagraph_mode")} for side, found in sides.items()
    }
    args.out.write_text(
        json.dumps({"provenance": made, "engines": engines, "results": results}, indent=1) + "\n",
        encoding="utf-8",
    )
    for row in results:
        print(
            f"batch {row['batch_size']:>3}: ours {row['ms_ours']:.3f} ms, stock {row['ms_stock']:.3f} ms, "
            f"ratio {row['ratio']:.2f} (target {TARGET})"
        )


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    main()
