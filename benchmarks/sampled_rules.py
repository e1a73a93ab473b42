"""Compares drawn with greedy drafts, and the rules that verify them, by accepted drafts at the same places of texts.

    python benchmarks/sampled_rules.py --texts texts.json --out benchmarks/results/sampled_rules.json --data FILE...

The texts are the target's own sampled answers, which are made first and kept in --texts. At every `stride`-th token of
each answer, each variant makes a draft, and one pass of the target reads all drafts. The expected number of accepted
drafts under each rule is computed from the target's distributions, so that it has no sampling noise of the
verification. Drawn trees are drawn twice. Differences between variants are paired by place, and so are their standard
errors.

`tokens` is 1 + accepted drafts, averaged over the places of the text. tau is an average over verifications. There are
more of these where drafts fail, so it is lower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.engines import ReferenceEngine
from vllm_eagle3.evaluation.settings import EvalSettings, load_tasks
from vllm_eagle3.provenance import provenance
from vllm_eagle3.reference.decode import CachedTarget, Proposer, Tree, chain, decode, eagle2_tree, grafted
from vllm_eagle3.reference.sampled import Node, accept_top_down, residual, sampled_tree

K, TREE, DRAWS = 5, (5, 4, 16), 2
Text = tuple[str, list[int], list[int]]  # task, prompt, answer


def top_down(tree: Tree, logits: Tensor, temperature: float, node: int = 0) -> float:
    """Expected number of accepted drafts below `node` by recursive rejection."""
    here, reached, total = Node(tree, node, logits, temperature), 1.0, 0.0
    for child in here.children:
        token, q = here.candidate(child)
        rate = min(1.0, float(here.p[token]) / max(float(q[token]), 1e-30))
        total += reached * rate * (1 + top_down(tree, logits, temperature, child)) if rate else 0.0
        reached *= 1 - rate
        here.p, _ = residual(here.p, q)
        here.drop(child)
    return total


def bottom_up(
    tree: Tree, logits: Tensor, temperature: float, node: int = 0, depth: int = 0, w: float = 1.0
) -> tuple[float, float]:
    """The same by traversal verification: sum of accepted drafts x probability, and the probability that all fail."""
    here, refused, total = Node(tree, node, logits, temperature), 1.0, 0.0
    for child in here.children:
        token, q = here.candidate(child)
        ratio = w * float(here.p[token]) / max(float(q[token]), 1e-30)
        below, rest = bottom_up(tree, logits, temperature, child, depth + 1, min(1.0, ratio))
        total, refused = total + refused * below, refused * rest
        here.p, left = residual(here.p, q, w)
        w = left / max(left + 1 - w, 1e-30) if w < 1 else 1.0
        here.drop(child)
    return total + refused * w * depth, refused * (1 - w)


def proposers(temperature: float, noise: torch.Generator) -> dict[str, tuple[Proposer, int]]:
    """The variants by name: the proposer, and how often it drafts at a place."""
    depth, topk, nodes = TREE
    drawn_chain = sampled_tree(K, 1, K, temperature, noise)
    drawn_tree = sampled_tree(depth, topk, nodes, temperature, noise)
    return {
        "chain, greedy": (chain(K), 1),
        "chain, drawn": (drawn_chain, DRAWS),
        "tree, greedy": (eagle2_tree(*TREE), 1),
        "tree, drawn": (drawn_tree, DRAWS),
        "tree, greedy, graft": (grafted(eagle2_tree(*TREE), places=nodes), 1),
        "tree, drawn, graft": (grafted(drawn_tree, places=nodes), DRAWS),
    }


def together(trees: Sequence[Tree]) -> tuple[Tree, list[list[int]]]:
    """One tree that contains all trees below one root, and the indices of each tree's nodes in it."""
    tokens, parents, rows = trees[0].tokens[:1], [-1], list[list[int]]()
    for tree in trees:
        first = len(tokens) - 1
        tokens += tree.tokens[1:]
        parents += [parent + first if parent else 0 for parent in tree.parents[1:]]
        rows.append([0, *range(first + 1, len(tokens))])
    return Tree(tokens, parents), rows


@torch.inference_mode()
def measure(
    engine: ReferenceEngine, text: Text, stride: int, temperature: float, seed: int
) -> list[dict[str, float]]:
    """Expected accepted drafts of each variant at each place of one answer, the last place first."""
    _, prompt, answer = text
    ids, noise = [*prompt, *answer], torch.Generator().manual_seed(seed)
    target, draft = CachedTarget(engine.model, engine.draft.config.aux_layers), engine.draft
    _, states = target(Tree(ids, list(range(-1, len(ids) - 1))), 0, logits_to_keep=1)
    g = draft.fuse(states)[:-1]
    a, kv = draft.layer(draft.embed(torch.tensor(ids[1:])), g, torch.arange(len(ids) - 1))
    found = []
    for root in range(len(ids) - 1, len(prompt) - 1, -stride):
        target.keep(root, [])
        trees, names = list[Tree](), list[str]()
        for name, (propose, times) in proposers(temperature, noise).items():
            prefix = kv[0][:root], kv[1][:root]
            trees += [propose(draft, a[root - 1 : root], prefix, ids[: root + 1]) for _ in range(times)]
            names += [name] * times
        whole, rows = together(trees)
        logits, _ = target(whole, root)
        here: dict[str, list[float]] = {}
        for name, tree, places in zip(names, trees, rows, strict=True):
            here.setdefault(name, []).append(top_down(tree, logits[places], temperature))
            if tree.drawn:
                here.setdefault(f"{name}, bottom-up", []).append(
                    bottom_up(tree, logits[places], temperature)[0]
                )
        found.append({name: sum(values) / len(values) for name, values in here.items()})
    return found


def make_texts(engine: ReferenceEngine, settings: EvalSettings) -> list[Text]:
    """The target's sampled answers to the first turns."""
    noise = torch.Generator().manual_seed(0)
    found = list[Text]()
    for task, prompts in load_tasks(settings).items():
        for prompt in tqdm(prompts, desc=task):
            ids = engine.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.turns[0]}], add_generation_prompt=True, return_dict=False
            )
            answer = decode(
                engine.model, engine.draft, ids, sampled_tree(K, 1, K, settings.temperature, noise),
                settings.max_tokens, engine.stop, settings.temperature, noise, accept_top_down,
            )  # fmt: skip
            found.append((task, ids, answer.tokens))
    return found


def summary(rows: list[dict[str, float]], base: str) -> dict[str, dict[str, float]]:
    """Tokens per place by variant, and the paired difference from `base` with its standard error."""
    found = {}
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        difference = values - torch.tensor([row[base] for row in rows], dtype=torch.float64)
        found[name] = {
            "tokens": 1 + float(values.mean()),
            "more_than_base": float(difference.mean()),
            "standard_error": float(difference.std()) / len(rows) ** 0.5,
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, help="prompts, JSON lines with `turns`")
    parser.add_argument("--texts", type=Path, required=True, help="the answers; made if the file is missing")
    parser.add_argument("--limit", type=int, default=2, help="prompts per file")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON file to write, after each answer")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    target, draft = default_pair()
    settings = EvalSettings(
        str(target), str(draft), tuple(options.data), ("reference-chain",), temperature=options.temperature,
        max_tokens=options.max_tokens, limit=options.limit,
    )  # fmt: skip
    sizes = {"chain": K, "tree": TREE, "draws": DRAWS, "stride": options.stride}
    made = provenance(settings.data, settings.public() | sizes)
    engine = ReferenceEngine("reference-chain", settings)
    if not options.texts.is_file():
        options.texts.write_text(json.dumps(make_texts(engine, settings)), encoding="utf-8")
    texts: list[Text] = json.loads(options.texts.read_text(encoding="utf-8"))
    by_task: dict[str, list[dict[str, float]]] = {}
    for seed, text in enumerate(tqdm(texts)):
        by_task.setdefault(text[0], []).extend(
            measure(engine, text, options.stride, options.temperature, seed)
        )
        everything = [row for rows in by_task.values() for row in rows]
        results: dict[str, Any] = {
            "answers": seed + 1,
            "places": len(everything),
            "chain": summary(everything, "chain, greedy"),
            "tree": summary(everything, "tree, greedy"),
            "by_task": {task: summary(rows, "tree, greedy") for task, rows in by_task.items()},
        }
        if options.out:
            report = {"provenance": made, "results": results}
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, row in results["tree"].items():
        print(
            f"{name}: {row['tokens']:.3f} tokens, {row['more_than_base']:+.3f} +- {row['standard_error']:.3f}"
        )


if __name__ == "__main__":
    main()
