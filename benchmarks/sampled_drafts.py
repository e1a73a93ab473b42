"""Mean tau of drawn drafts and their rules of verification against greedy drafts, in the reference decoder.

    python benchmarks/sampled_drafts.py --data FILE... --limit 4 --out benchmarks/results/sampled_drafts.json

Every variant answers the same prompts; texts differ, for they are sampled. `nodes` is what a verification reads on
average. The standard error is that of the mean over verifications, task by task, and leaves out that the
verifications of one answer resemble each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.engines import ReferenceEngine
from vllm_eagle3.evaluation.metrics import repeated_4grams
from vllm_eagle3.evaluation.settings import EvalSettings
from vllm_eagle3.evaluation.worker import tasks
from vllm_eagle3.provenance import provenance
from vllm_eagle3.reference.decode import Proposer, Verifier, accept, chain, decode, eagle2_tree, grafted
from vllm_eagle3.reference.sampled import RULES, sampled_tree

K = 5
TREES = {"tree 5/4/16": (5, 4, 16), "tree 6/10/60": (6, 10, 60)}
Noise = torch.Generator


def variants(temperature: float) -> dict[str, tuple[Callable[[Noise], Proposer], Verifier]]:
    """By name: the proposer, given its noise, and the rule of verification."""
    top_down, bottom_up = RULES["top-down"], RULES["bottom-up"]
    found: dict[str, tuple[Callable[[Noise], Proposer], Verifier]] = {
        "chain, greedy": (lambda noise: chain(K), accept),
        "chain, drawn": (lambda noise: sampled_tree(K, 1, K, temperature, noise), top_down),
        "chain, drawn, block": (lambda noise: sampled_tree(K, 1, K, temperature, noise), bottom_up),
    }
    for name, shape in TREES.items():
        found[f"{name}, greedy"] = (lambda noise, s=shape: eagle2_tree(*s), accept)
        found[f"{name}, drawn"] = (lambda noise, s=shape: sampled_tree(*s, temperature, noise), top_down)
        found[f"{name}, traversal"] = (lambda noise, s=shape: sampled_tree(*s, temperature, noise), bottom_up)
    for name in list(found):
        make, rule = found[name]
        found[f"{name}, graft"] = (lambda noise, m=make: grafted(m(noise)), rule)
    return found


def measure(
    engine: ReferenceEngine, prompts: Sequence[list[int]], make: Any, rule: Verifier, settings: EvalSettings
) -> dict[str, Any]:
    noise = torch.Generator(engine.model.device).manual_seed(0)
    accepted, drafted, answers = list[int](), list[int](), list[list[int]]()
    for prompt in prompts:
        got = decode(
            engine.model, engine.draft, prompt, make(noise), settings.max_tokens, engine.stop,
            settings.temperature, noise, rule,
        )  # fmt: skip
        accepted, drafted, answers = accepted + got.accepted, drafted + got.drafted, [*answers, got.tokens]
    return {
        "tau": 1 + statistics.fmean(accepted),
        "standard_error": statistics.stdev(accepted) / len(accepted) ** 0.5,
        "verifications": len(accepted),
        "nodes": statistics.fmean(drafted),
        "repeated_4grams": repeated_4grams(answers),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, help="prompts, JSON lines with `turns`")
    parser.add_argument("--limit", type=int, default=4, help="prompts per file; first turns only")
    parser.add_argument("--skip", type=int, default=0, help="prompts per file left out before them")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose names contain one of these")
    parser.add_argument("--out", type=Path, help="JSON file to write, after each variant")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    target, draft = default_pair()
    results: list[dict[str, Any]] = []
    settings = EvalSettings(str(target), str(draft), tuple(options.data), ("reference-chain",))
    made = provenance(settings.data, vars(options) | {"out": None, "data": None, "chain": K})
    engine = ReferenceEngine("reference-chain", settings)
    for temperature in options.temperatures:
        settings = EvalSettings(
            str(target), str(draft), tuple(options.data), ("reference-chain",),
            temperature=temperature, max_tokens=options.max_tokens, limit=options.skip + options.limit,
        )  # fmt: skip
        prompts = {
            task: [
                engine.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt.turns[0]}],
                    add_generation_prompt=True,
                    return_dict=False,
                )
                for prompt in found[options.skip :]
            ]
            for task, found in tasks(settings).items()
        }
        chosen = {
            name: variant
            for name, variant in variants(temperature).items()
            if any(part in name for part in options.only)
        }
        for name, (make, rule) in tqdm(chosen.items()):
            rows = {task: measure(engine, p, make, rule, settings) for task, p in prompts.items()}
            mean = {key: statistics.fmean(row[key] for row in rows.values()) for key in ("tau", "nodes")}
            error = sum(row["standard_error"] ** 2 for row in rows.values()) ** 0.5 / len(rows)
            results.append(
                {"variant": name, "temperature": temperature, **mean, "standard_error": error, "tasks": rows}
            )
            taus = "  ".join(f"{task} {row['tau']:.2f}" for task, row in rows.items())
            tqdm.write(
                f"T {temperature}  {name}: tau {mean['tau']:.3f} +- {error:.3f}, {mean['nodes']:.1f} nodes  {taus}"
            )
            if options.out:
                report = {"provenance": made, "results": results}
                options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
