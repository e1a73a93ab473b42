"""Time to the first token of a long prompt: without speculation, with chains and with trees, each in its own engine.

The answer has one token, so the time consists of reading the prompt, the draft's pass over it and the first drafts.
The weights are random in a real model's shape; the prompt is random, and no prefix is cached.

    python benchmarks/bench_ttft.py --out benchmarks/results/ttft_<device>.json
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
from pathlib import Path
from typing import Any

import torch

from vllm_eagle3.evaluation.evaluate import environment
from vllm_eagle3.evaluation.model_shapes import SHAPES, write_shape
from vllm_eagle3.provenance import provenance
from vllm_eagle3.runner.engine_memory import memory_arguments

TARGET = 1.10  # the time with trees / without speculation is to be at most this
TREE = {"depth": 6, "topk": 10, "nodes": 60}
MODES: dict[str, tuple[int, dict[str, Any]]] = {  # number of drafts, this project's options
    "none": (0, {}),
    "chain": (3, {"policy": "fixed"}),
    "tree": (TREE["nodes"], {"policy": "fixed", "tree": TREE}),
}


def measure(mode: str, shape: str, lengths: list[int], repeats: int, eager: bool) -> dict[str, list[float]]:
    """{prompt length: seconds of each repeat} of an engine in this process. The first repeat is a warm-up."""
    from vllm import LLM, SamplingParams

    drafts, options = MODES[mode]
    most = max(lengths) + 2 + drafts
    dtype = "float32" if eager else "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        target, draft = write_shape(shape, Path(folder), positions=most)
        speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": drafts}
        llm = LLM(
            str(target),
            speculative_config=speculative if drafts else None,
            additional_config={"eagle3": options} if drafts else {},
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=most,
            max_num_seqs=4,
            enforce_eager=eager,
            enable_prefix_caching=False,
            seed=0,
            **memory_arguments(target, draft, batch_size=4, max_model_len=most, drafts=drafts, dtype=dtype),
        )
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    vocab = SHAPES[shape][0]["vocab_size"]
    times: dict[str, list[float]] = {}
    for length in lengths:
        seconds = []
        for _ in range(repeats + 1):
            ids = torch.randint(2, vocab, (length,), generator=generator).tolist()
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        times[str(length)] = seconds[1:]
    return times


def run_mode(mode: str, arguments: list[str]) -> dict[str, list[float]]:
    """`measure` in a separate process. Raises RuntimeError if it fails; its messages are on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "mode.json"
        command = [sys.executable, __file__, *arguments, "--mode", mode, "--out", str(out)]
        done = subprocess.run(command, env=environment("none" if mode == "none" else mode), check=False)
        if done.returncode:
            raise RuntimeError(f"{mode}: the engine failed with exit code {done.returncode}; see above")
        return json.loads(out.read_text(encoding="utf-8"))


def result_rows(found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row per prompt length and mode: the median in milliseconds, and its ratio to the one without speculation."""
    rows = []
    for length, plain in found["none"].items():
        base = statistics.median(plain)
        for mode, times in found.items():
            median = statistics.median(times[length])
            row = {"prompt_tokens": int(length), "mode": mode, "ms": round(1e3 * median, 3)}
            row |= {"ms_fastest": round(1e3 * min(times[length]), 3), "ratio": round(median / base, 3)}
            if mode == "tree":
                row |= {"target": TARGET, "met": median <= TARGET * base}
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="tiny shape, short prompts; needs no GPU")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.dry_run:
        args.shape, args.prompt_tokens, args.repeats = "tiny", [16, 40], 1
    if args.mode:
        found = measure(args.mode, args.shape, args.prompt_tokens, args.repeats, args.dry_run)
        args.out.write_text(json.dumps(found), encoding="utf-8")
        return
    settings = {name: getattr(args, name) for name in ("shape", "prompt_tokens", "repeats")}
    made = provenance([], settings | {"tree": TREE, "weights": "random"})
    arguments = ["--shape", args.shape, "--repeats", str(args.repeats)]
    arguments += ["--prompt-tokens", *map(str, args.prompt_tokens), *(["--dry-run"] if args.dry_run else [])]
    results = result_rows({mode: run_mode(mode, arguments) for mode in MODES})
    args.out.write_text(
        json.dumps({"provenance": made, "results": results}, indent=1) + "\n", encoding="utf-8"
    )
    for row in results:
        print(
            f"{row['prompt_tokens']:>6} tokens, {row['mode']:>5}: {row['ms']:.1f} ms, ratio {row['ratio']:.2f}"
        )


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    main()
