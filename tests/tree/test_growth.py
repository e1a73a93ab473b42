"""Trees grown from fixed draft distributions equal a literal reference, also with ties (15 s)."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.kernels import top_k
from vllm_eagle3.tree.growth import Expansion, candidates

VOCAB = 7
NEG = np.float32(-np.inf)


def log_probs_of(path, levels, tied):
    """A draft's distribution after `path` (tokens), which does not depend on the order of calls."""
    rng = np.random.default_rng([*path, 99])
    if tied:  # few distinct values, so that siblings, cousins and levels tie
        return rng.choice(np.float32([-0.25, -0.5, -1.0]), VOCAB)
    return np.log(rng.dirichlet(np.ones(VOCAB))).astype(np.float32)


def reference_tree(first, depth, topk, nodes, tied, chain):
    """EAGLE-2's tree in a literal form: lists, Python's stable sort, one node at a time."""
    tree, frontier = [], [{"path": [first], "score": np.float32(0), "index": -1}]
    for _ in range(depth):
        level = []
        for place, parent in enumerate(frontier):
            scores = log_probs_of(parent["path"], depth, tied)
            children = sorted(range(VOCAB), key=lambda t, scores=scores: (-scores[t], t))[:topk]
            for rank, token in enumerate(children):
                score = np.float32(parent["score"] + scores[token])
                if chain and (place or rank):
                    score = NEG
                level.append({"path": [*parent["path"], token], "score": score, "parent": parent["index"]})
        for node in level:
            node["index"] = len(tree)
            tree.append(node)
        frontier = sorted(level, key=lambda node: -node["score"])[:topk]
    kept = [n for n in sorted(tree, key=lambda node: -node["score"])[:nodes] if n["score"] != NEG]
    number = {node["index"]: i + 1 for i, node in enumerate(kept)} | {-1: 0}
    return [(n["path"][-1], number[n["parent"]], n["score"]) for n in kept]


def grown_tree(firsts, depth, topk, nodes, tied, chain):
    """The same trees by Expansion, for a batch of requests. Distributions are looked up by path."""
    expansion = Expansion(topk, torch.tensor(chain))
    paths = [[[first]] for first in firsts]

    def children():
        rows = [[log_probs_of(path, depth, tied) for path in request] for request in paths]
        return top_k(torch.tensor(np.array(rows)), topk)

    frontier = expansion.grow(*children())
    for _ in range(depth - 1):
        pairs = zip(paths, frontier.parents.tolist(), frontier.tokens.tolist(), strict=True)
        paths = [
            [[*old[p], t] for p, t in zip(parents, tokens, strict=True)] for old, parents, tokens in pairs
        ]
        frontier = expansion.grow(*children())
    return expansion.rerank(nodes)


@settings(max_examples=400, deadline=None)
@given(
    firsts=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
    depth=st.integers(1, 5),
    topk=st.integers(1, VOCAB),
    nodes=st.integers(1, 62),
    tied=st.booleans(),
    seed=st.integers(0, 15),
)
def test_tree_equals_literal_reference(firsts, depth, topk, nodes, tied, seed):
    chain = [bool(seed >> i & 1) and tied for i in range(len(firsts))]
    tree = grown_tree(firsts, depth, topk, nodes, tied, chain)
    for row, first in enumerate(firsts):
        expected = reference_tree(first, depth, topk, nodes, tied, chain[row])
        used = len(expected)
        found = list(zip(*(column[row].tolist() for column in tree[:3]), strict=True))
        assert found[:used] == [(t, p, float(s)) for t, p, s in expected]
        assert all(rest == (0, -1, float("-inf")) for rest in found[used:])
        # Connected, and in topological order: each parent is the root or an earlier node.
        assert all(parent <= i for i, (_, parent, _) in enumerate(found[:used]))


def test_a_prefix_of_a_tree_is_the_smaller_tree():
    big = grown_tree([3, 4], 4, 3, 30, False, [False, False])
    small = grown_tree([3, 4], 4, 3, 9, False, [False, False])
    for found, expected in zip(big, small, strict=True):
        assert torch.equal(found[:, : expected.shape[1]], expected)


def test_a_chain_request_keeps_the_greedy_path():
    tree = grown_tree([5], 4, 3, 12, False, [True])
    path = [5]
    for _ in range(4):
        path.append(int(np.argmax(log_probs_of(path, 4, False))))
    assert tree.tokens[0].tolist() == path[1:] + [0] * 8
    assert tree.parents[0].tolist() == [0, 1, 2, 3] + [-1] * 8


def test_number_of_candidates():
    assert candidates(6, 10) == 510
    assert candidates(4, 1) == 4
