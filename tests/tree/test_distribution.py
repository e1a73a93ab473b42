"""Trees at temperature 1 do not change the target's distribution: chi-squared test of three tokens jointly (10 s)."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from vllm_eagle3.kernels import top_k
from vllm_eagle3.tree.acceptance import accept
from vllm_eagle3.tree.growth import Expansion, Tree

VOCAB, LENGTH, SAMPLES = 5, 3, 20_000


@cache
def target(prefix):
    return np.random.default_rng([1, *prefix]).dirichlet(np.full(VOCAB, 1.5))


@cache
def draft(prefix):
    """Log-probabilities of a draft that is partly like the target."""
    other = np.random.default_rng([2, *prefix]).dirichlet(np.ones(VOCAB))
    return np.log(0.5 * target(prefix) + 0.5 * other).astype(np.float32)


@cache
def tree_after(prefix, depth, topk, nodes):
    """Parents, tokens and paths of the tree that the draft grows after `prefix`; column 0 is the root."""
    expansion, paths = Expansion(topk, torch.tensor([False])), [prefix]
    for _ in range(depth):
        frontier = expansion.grow(*top_k(torch.tensor(np.array([[draft(path) for path in paths]])), topk))
        parents, tokens = frontier.parents[0].tolist(), frontier.tokens[0].tolist()
        paths = [(*paths[p], t) for p, t in zip(parents, tokens, strict=True)]
    tree: Tree = expansion.rerank(nodes)
    node_paths = [prefix]
    for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0].tolist(), strict=True):
        node_paths.append((*node_paths[max(parent, 0)], token))
    root = torch.tensor([[-1]])
    return torch.cat([root, tree.parents], 1), torch.cat([root, tree.tokens], 1), node_paths


def chi_squared(texts):
    """Chi-squared of the counts of the first three tokens against the target's joint distribution, and its z-score."""
    cells = list(product(range(VOCAB), repeat=LENGTH))
    counts = np.array([texts.get(cell, 0) for cell in cells])
    share = [np.prod([target(cell[:i])[cell[i]] for i in range(LENGTH)]) for cell in cells]
    expected = np.array(share) * counts.sum()
    freedom = len(cells) - 1
    value = ((counts - expected) ** 2 / expected).sum()
    return (value - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(("depth", "topk", "nodes"), [(1, 1, 1), (2, 2, 6), (3, 4, 10), (3, 5, 25)])
def test_joint_distribution_of_three_tokens(depth, topk, nodes):
    generator = torch.Generator().manual_seed(nodes)
    texts, accepted, steps = {(): SAMPLES}, 0, 0
    while any(len(text) < LENGTH for text in texts):
        following = {}
        for prefix, count in texts.items():
            if len(prefix) >= LENGTH:
                following[prefix] = following.get(prefix, 0) + count
                continue
            parents, tokens, paths = tree_after(prefix, depth, topk, nodes)
            weights = torch.tensor(np.array([target(path) for path in paths]))
            drawn = torch.multinomial(weights, count, replacement=True, generator=generator).T.contiguous()
            _, emitted, emitted_count = accept(parents.repeat(count, 1), tokens.repeat(count, 1), drawn)
            steps, accepted = steps + count, accepted + int(emitted_count.sum()) - count
            for row, n in zip(emitted.tolist(), emitted_count.tolist(), strict=True):
                text = (*prefix, *row[:n])[:LENGTH]
                following[text] = following.get(text, 0) + 1
        texts = following
    assert accepted > 0.2 * steps
    assert abs(chi_squared(texts)) < 4
