"""Grafts on a hand-drawn tree, and compared with literal lists of paths (3 s)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.tree.graft import graft, worthwhile


def literal(tree, continuation, places, chain):
    """Literal form: collect the paths in the order of the result, then make nodes of them. tree: (token, parent)."""
    paths = [()]
    for token, parent in tree:
        paths.append((*paths[parent], token))
    graft = [tuple(continuation[:places][: i + 1]) for i in range(len(continuation[:places]))]
    if chain and graft and paths[-1] not in [(), *graft] and graft[-1] not in paths:
        graft = []
    merged = [(), *graft, *(path for path in paths[1:] if path not in graft)][: places + 1]
    return [(path[-1], merged.index(path[:-1])) for path in merged[1:]]


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
@given(nodes=st.integers(1, 20), length=st.integers(1, 10), places=st.integers(1, 25), data=st.data())
def test_against_literal_paths(nodes, length, places, data):
    batch = data.draw(st.lists(trees(nodes), min_size=1, max_size=4))
    chains = [data.draw(st.booleans()) for _ in batch]
    batch = [
        [(token, i) for i, (token, _) in enumerate(tree)] if c else tree
        for tree, c in zip(batch, chains, strict=True)
    ]
    texts = [data.draw(st.lists(st.integers(0, 3), max_size=length)) for _ in batch]
    texts = [  # some follow a path of the tree
        ([token for token, _ in tree] + text)[:length] if data.draw(st.booleans()) else text
        for tree, text in zip(batch, texts, strict=True)
    ]
    tokens = padded([[token for token, _ in tree] for tree in batch], nodes, 0)
    parents = padded([[parent for _, parent in tree] for tree in batch], nodes, -1)
    found = graft(tokens, parents, padded(texts, length, -1), places, torch.tensor(chains))
    for row, (tree, text) in enumerate(zip(batch, texts, strict=True)):
        expected = literal(tree, text, places, chains[row])
        width, used = places, len(expected)
        assert found[0][row].tolist() == [token for token, _ in expected] + [0] * (width - used)
        assert found[1][row].tolist() == [parent for _, parent in expected] + [-1] * (width - used)
        paths, merged = [()], [()]
        for nodes_of, out in ((tree, paths), (expected, merged)):
            for token, parent in nodes_of:
                out.append((*out[parent], token))
        numbers = [merged.index(path) if path in merged else places + 1 for path in paths]
        assert found.number[row, : len(paths)].tolist() == numbers


def test_hand_drawn():
    #     0            The continuation 7 9 5 6 follows nodes 1 and 3; 5 and 6 hang below.
    #    / \
    #   1   2    tokens 1:7 2:8 3:9 4:4
    #   |
    #   3 - 4 (both below 1)
    tokens, parents = torch.tensor([[7, 8, 9, 4]]), torch.tensor([[0, 0, 1, 1]])
    found = [t.tolist() for t in graft(tokens, parents, torch.tensor([[7, 9, 5, 6]]), 8)[:2]]
    assert found == [[[7, 9, 5, 6, 8, 4, 0, 0]], [[0, 1, 2, 3, 0, 1, -1, -1]]]
    found = [t.tolist() for t in graft(tokens, parents, torch.tensor([[7, 9, 5, 6]]), 5)[:2]]
    assert found == [[[7, 9, 5, 6, 8]], [[0, 1, 2, 3, 0]]]  # the worst node gave up its place
    found = [t.tolist() for t in graft(tokens, parents, torch.tensor([[-1, -1, -1, -1]]), 5)[:2]]
    assert found == [[[7, 8, 9, 4, 0]], [[0, 0, 1, 1, -1]]]


def test_a_chain_stays_a_chain():
    tokens, parents = torch.tensor([[7, 8, 9]] * 3), torch.tensor([[0, 1, 2]] * 3)
    continuations = torch.tensor([[7, 8, 9, 1], [7, 8, -1, -1], [7, 9, 9, 9]])
    found = graft(tokens, parents, continuations, 5, torch.ones(3, dtype=torch.bool))
    assert found.tokens.tolist() == [[7, 8, 9, 1, 0], [7, 8, 9, 0, 0], [7, 8, 9, 0, 0]]


def test_too_many_nodes():
    with pytest.raises(ValueError, match="1 to 64 nodes"):
        graft(torch.zeros(1, 64).long(), torch.zeros(1, 64).long(), torch.zeros(1, 8).long(), 62)


@settings(max_examples=200, deadline=None)
@given(nodes=st.integers(0, 8), length=st.integers(1, 6), places=st.integers(1, 12), data=st.data())
def test_a_graft_takes_the_places_of_less_likely_nodes(nodes, length, places, data):
    """Literally: places go one by one to the likelier of the next node and the next token of the graft."""
    share = st.floats(0.01, 1.0)
    falling = [
        torch.tensor(data.draw(st.lists(share, min_size=n, max_size=n))).sort(descending=True).values
        for n in (nodes, length)
    ]
    values, survival = falling[0].log().exp(), falling[1]
    kept, grafted = 0, 0
    while kept + grafted < places and grafted < length:
        if kept < nodes and values[kept] > survival[grafted]:
            kept += 1
        else:
            grafted += 1
    found = int(worthwhile(survival[None], falling[0].log()[None], places))
    assert found == min(grafted, places)
