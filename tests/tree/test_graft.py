"""Grafts on a hand-drawn tree and against a literal trie (3 s)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.tree.graft import graft


def literal(tree, continuation):
    """tree: (token, parent) of each node. Inserts the continuation token by token into a trie of paths."""
    paths = [()]
    for token, parent in tree:
        paths.append((*paths[parent], token))
    path = ()
    for token in continuation:
        parent, path = paths.index(path), (*path, token)
        if path not in paths:
            paths.append(path)
            tree = [*tree, (token, parent)]
    return tree


@st.composite
def trees(draw, nodes):
    """Up to `nodes` nodes whose siblings differ, as a draft's top-k children do."""
    tree, taken = [], set()
    for _ in range(draw(st.integers(0, nodes))):
        node = draw(st.integers(0, 3)), draw(st.integers(0, len(tree)))
        if node not in taken:
            taken.add(node)
            tree.append(node)
    return tree


def padded(rows, width, fill):
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows]).reshape(len(rows), width)


@settings(max_examples=500, deadline=None)
@given(nodes=st.integers(1, 20), length=st.integers(1, 10), data=st.data())
def test_against_a_literal_trie(nodes, length, data):
    batch = data.draw(st.lists(trees(nodes), min_size=1, max_size=4))
    texts = [data.draw(st.lists(st.integers(0, 3), max_size=length)) for _ in batch]
    tokens = padded([[token for token, _ in tree] for tree in batch], nodes, 0)
    parents = padded([[parent for _, parent in tree] for tree in batch], nodes, -1)
    found = graft(tokens, parents, padded(texts, length, -1))
    for row, (tree, text) in enumerate(zip(batch, texts, strict=True)):
        expected = literal(tree, text)
        width, used = nodes + length, len(expected)
        assert found.tokens[row].tolist() == [token for token, _ in expected] + [0] * (width - used)
        assert found.parents[row].tolist() == [parent for _, parent in expected] + [-1] * (width - used)
        assert (found.grown[row], found.added[row]) == (len(tree), used - len(tree))


def test_hand_drawn():
    #     0            The continuation 7 9 5 6 follows nodes 1 and 3; 5 and 6 hang below.
    #    / \
    #   1   2    tokens 1:7 2:8 3:9 4:4
    #   |
    #   3 - 4 (both below 1)
    tokens, parents = torch.tensor([[7, 8, 9, 4]]), torch.tensor([[0, 0, 1, 1]])
    found = graft(tokens, parents, torch.tensor([[7, 9, 5, 6]]))
    assert found.tokens.tolist() == [[7, 8, 9, 4, 5, 6, 0, 0]]
    assert found.parents.tolist() == [[0, 0, 1, 1, 3, 5, -1, -1]]


def test_too_many_nodes():
    with pytest.raises(ValueError, match="1 to 64 nodes"):
        graft(torch.zeros(1, 60).long(), torch.zeros(1, 60).long(), torch.zeros(1, 8).long())
