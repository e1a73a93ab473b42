"""Trees that contain the true continuation among wrong nodes: they test verification without depending on a draft."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Seen:
    """A record of the draft's first step and of the sampler."""

    root_children: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Ids of the root's children in the draft, by (request, position of the last accepted token)."""
    texts: dict[int, Sequence[int]] = field(default_factory=dict)
    """Texts of further requests, which the test may add."""
    accepted: int = 0
    moved: int = 0


def random_tree(
    rng: random.Random, true: Sequence[int], nodes: int, depth: int, vocab: int
) -> list[tuple[int, int]]:
    """(token, parent) of `nodes` nodes: part of the true path, wrong nodes, and right tokens under wrong parents."""
    on_path = sorted(rng.sample(range(1, nodes + 1), rng.randint(0, min(depth, len(true), nodes))))
    tree, depths, last, used = [], [0], 0, {}
    for node in range(1, nodes + 1):
        level = on_path.index(node) if node in on_path else -1
        if level >= 0 and true[level] not in used.get(last, set()):
            token, parent, last = true[level], last, node
        else:
            if level >= 0:
                on_path = on_path[:level]  # a wrong node has this place, so the path ends here
            parent = rng.choice([p for p in range(node) if depths[p] < depth])
            taken = used.get(parent, set())
            token = rng.choice([t for t in [rng.randrange(vocab), *true[:4]] if t not in taken] or [-1])
            while token in taken or token < 0:
                token = rng.randrange(vocab)
        used.setdefault(parent, set()).add(token)
        depths.append(depths[parent] + 1)
        tree.append((token, parent))
    return tree


@contextmanager
def oracle(texts: Sequence[Sequence[int]] | None, vocab: int, seed: int = 0) -> Iterator[Seen]:
    """Replace the growth of trees in the engines of this process.

    texts: full token lists; request number i continues `texts[i % len(texts)]`. None: trees that never match.
    Requests in `chain_only` get the true continuation as a chain.
    """
    from vllm_eagle3.runner.v2 import tree_rejection_sampler, tree_speculator

    rng, seen = random.Random(seed), Seen()

    def grow(self: Any, input_batch: Any, nodes: int, attend: bool) -> None:
        rows = []
        for b, req_id in enumerate(input_batch.req_ids):
            position = int(self.input_buffers.positions[b]) + 1  # of the last accepted token
            request = int(req_id.split("-")[0])
            seen.root_children[request, position] = self.root_children[1][b].tolist()
            if texts is None:
                rows.append([(vocab - 1, i) for i in range(nodes)])
                continue
            text = seen.texts.get(request, texts[request % len(texts)])
            true = list(text[position + 1 :])[: self.tree.depth]
            if self.chain[b]:
                rows.append([(t, i) for i, t in enumerate(true)] + [(0, -1)] * (nodes - len(true)))
            else:
                rows.append(random_tree(rng, true, nodes, self.tree.depth, vocab))
        tree, batch = torch.tensor(rows), slice(0, input_batch.num_reqs)
        self.draft_tokens[batch, :nodes], self.parents[batch, :nodes] = tree.unbind(-1)

    def accept(parents: torch.Tensor, tokens: torch.Tensor, drawn: torch.Tensor) -> Any:
        path, emitted, count = original_accept(parents, tokens, drawn)
        seen.accepted += int(count.sum()) - len(count)
        seen.moved += int((path != torch.arange(path.shape[1])).sum())
        return path, emitted, count

    original_grow, original_accept = tree_speculator.TreeSpeculator._grow, tree_rejection_sampler.accept
    tree_speculator.TreeSpeculator._grow, tree_rejection_sampler.accept = grow, accept
    try:
        yield seen
    finally:
        tree_speculator.TreeSpeculator._grow, tree_rejection_sampler.accept = original_grow, original_accept
