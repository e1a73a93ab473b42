"""A whole step with a tree against a step with a chain of 5, at batch 1, on Model Runner V2 on a CPU.

Every shape has a process with an engine of its own; the processes take turns over the same prompts. A step is one call
of the engine's `step` that decodes; its phases are the target's forward pass, the verification and the draft.

    python benchmarks/bench_cpu_tree_step.py [--shapes 5/4/16 3/2/6] [--json benchmarks/results/cpu_tree_step.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.prompts import load_prompts
from vllm_eagle3.provenance import provenance

ROOT = Path(__file__).parents[1]
CHAIN = "5"  # drafts of the chain that trees are compared with
PHASES = {"execute_model": "forward", "sample_tokens": "verify_and_draft", "propose": "draft"}


def engine(shape: str, target: str, draft: str, batch: int, dtype: str) -> Any:
    """An engine that drafts one shape: the number of a chain's drafts, or depth/topk/nodes of a tree."""
    from vllm import LLM

    options: dict[str, Any] = {"policy": "fixed"}
    drafts = int(shape.split("/")[-1])
    if "/" in shape:
        depth, topk, nodes = map(int, shape.split("/"))
        options["tree"] = {"depth": depth, "topk": topk, "nodes": nodes}
    return LLM(
        model=target,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=batch,
        kv_cache_memory_bytes=200 << 20,
        enable_prefix_caching=False,
        async_scheduling=False,
        speculative_config={"method": "eagle3", "model": draft, "num_speculative_tokens": drafts},
        additional_config={"eagle3": options},
    )


def serve(pipe: Connection, shape: str, target: str, draft: str, batch: int, dtype: str) -> None:
    """A process: an engine that answers each list of prompts with the times of its decoding steps, in ms."""
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    llm = engine(shape, target, draft, batch, dtype)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    spent: dict[str, float] = defaultdict(float)
    for owner, name in ((runner, "execute_model"), (runner, "sample_tokens"), (runner.speculator, "propose")):
        setattr(owner, name, timed(getattr(owner, name), spent, PHASES[name]))
    while (asked := pipe.recv()) is not None:
        pipe.send(run(llm, *asked, spent))


def timed(function: Any, spent: dict[str, float], phase: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[phase] += 1e3 * (time.perf_counter() - start)

    return call


def run(llm: Any, prompts: list[str], tokens: int, spent: dict[str, float]) -> dict[str, Any]:
    """Answer the prompts together. A step that takes in a prompt does not count, nor does the first one after it."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    for i, prompt in enumerate(prompts):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        engine.add_request(f"{time.monotonic_ns()}-{i}", tokens_input(ids), greedy)
    steps, emitted, texts = [], 0, {}
    made: dict[str, int] = {}
    while engine.has_unfinished_requests():
        spent.clear()
        start = time.perf_counter()
        outputs = engine.step()
        whole = 1e3 * (time.perf_counter() - start)
        for out in outputs:
            emitted += len(out.outputs[0].token_ids) - made.get(out.request_id, 0) if made else 0
            made[out.request_id] = len(out.outputs[0].token_ids)
            texts[out.request_id] = out.outputs[0].text
        steps.append({"step": whole, **spent, "verify": spent["verify_and_draft"] - spent["draft"]})
    return {
        "steps": steps[2:],
        "tokens_per_step": emitted / max(len(steps) - 1, 1),
        "texts": list(texts.values()),
    }


def compare(shapes: list[str], args: argparse.Namespace, target: str, draft: str) -> list[dict[str, Any]]:
    """One row a shape, the chain's first."""
    prompts = [prompt.turns[0] for prompt in load_prompts(ROOT / "tests" / "data" / "prompts.jsonl")]
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for shape in shapes:
        pipes[shape], theirs = context.Pipe()
        settings = (theirs, shape, target, draft, args.batch_size, args.dtype)
        processes.append(context.Process(target=serve, args=settings))
        processes[-1].start()
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for repeat in range(args.repeats + 1):  # the first one warms up
        asked = [prompts[(repeat * args.batch_size + i) % len(prompts)] for i in range(args.batch_size)]
        for shape in shapes if repeat % 2 else shapes[::-1]:
            pipes[shape].send((asked, args.max_tokens))
            answer = pipes[shape].recv()
            if repeat:
                found[shape].append(answer)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    chain = [median(s["step"] for s in answer["steps"]) for answer in found[CHAIN]]
    return [row(shape, found[shape], chain) for shape in shapes]


def row(shape: str, answers: list[dict[str, Any]], chain: list[float]) -> dict[str, Any]:
    """Medians over all steps, and of each repeat the ratio of the median step to the chain's."""
    steps = [s for answer in answers for s in answer["steps"]]
    ratios = [median(s["step"] for s in a["steps"]) / base for a, base in zip(answers, chain, strict=True)]
    return {
        "shape": shape,
        "ms": {phase: median(s[phase] for s in steps) for phase in ("step", "forward", "verify", "draft")},
        "step_over_chain": median(ratios),
        "ratios": ratios,
        "tokens_per_step": sum(a["tokens_per_step"] for a in answers) / len(answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["3/3/7", "5/4/16"], help="depth/topk/nodes")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    target, draft = map(str, default_pair())
    rows = compare([CHAIN, *args.shapes], args, target, draft)
    print("| shape | step ms | forward | verify | draft | step / chain's (range) | tokens a step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        times = " | ".join(f"{r['ms'][p]:.2f}" for p in ("step", "forward", "verify", "draft"))
        spread = f"{r['step_over_chain']:.3f} ({min(r['ratios']):.3f} to {max(r['ratios']):.3f})"
        print(f"| {r['shape']} | {times} | {spread} | {r['tokens_per_step']:.2f} |")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"} | {"chain": CHAIN}
        made = provenance([str(ROOT / "tests" / "data" / "prompts.jsonl")], settings)
        args.json.write_text(
            json.dumps({"results": rows, "provenance": made}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
