"""ancestor_bits and tree_walk equal walks along parent links, node by node (5 s interpreted)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_eagle3.kernels import MAX_NODES, ancestor_bits, tree_walk

BACKENDS = ["triton", "torch"]


@st.composite
def trees(draw, max_nodes=MAX_NODES):
    """Parents of a tree in topological order, a random share of its nodes unused."""
    n = draw(st.integers(1, max_nodes))
    parents = [draw(st.sampled_from([0, -1]))]  # the value at the root is ignored
    used = [0]
    for i in range(1, n):
        if draw(st.integers(0, 4)) == 0:
            parents.append(-1)
        else:
            parents.append(
                draw(st.sampled_from(used[-3:])) if draw(st.booleans()) else draw(st.sampled_from(used))
            )
            used.append(i)
    return parents


def expected_masks(parents):
    depth, bits = [], []
    for i in range(len(parents)):
        chain = [i]
        while chain[-1] != 0 and parents[chain[-1]] >= 0:
            chain.append(parents[chain[-1]])
        if chain[-1] != 0:
            chain = [0]  # unused
        depth.append(len(chain) - 1)
        mask = sum(1 << j for j in chain)
        bits.append(mask - 2**64 if mask >= 2**63 else mask)
    return depth, bits


def expected_walk(parents, tokens, sampled):
    node, path = 0, [0]
    while True:
        children = [
            i for i in range(node + 1, len(parents)) if parents[i] == node and tokens[i] == sampled[node]
        ]
        if not children:
            return path + list(range(len(path), len(parents))), len(path) - 1
        node = children[0]
        path.append(node)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_a_drawn_tree(backend, device):
    #        0
    #      1   2        5 unused
    #     3 4    6
    #              7
    parents = torch.tensor([[0, 0, 0, 1, 1, -1, 2, 6]], device=device)
    depth, bits = ancestor_bits(parents, backend=backend)
    visible = [[(bits[0, i].item() >> j) & 1 for j in range(8)] for i in range(8)]
    assert depth.tolist() == [[0, 1, 1, 2, 2, 0, 2, 3]]
    assert visible == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_longest_chain_reaches_the_sign_bit(backend, device):
    parents = torch.arange(-1, 63, device=device).repeat(2, 1)
    depth, bits = ancestor_bits(parents, backend=backend)
    assert depth[1].tolist() == list(range(64))
    assert bits[1, 63].item() == -1 and bits[1, 62].item() == 2**63 - 1


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(tree=trees(), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_masks_of_any_tree(backend, tree, dtype, device):
    depth, bits = ancestor_bits(torch.tensor([tree, tree], dtype=dtype, device=device), backend=backend)
    assert (depth.dtype, bits.dtype) == (torch.int32, torch.int64)
    assert (depth[1].tolist(), bits[1].tolist()) == expected_masks(tree)
    assert torch.equal(depth[0], depth[1]) and torch.equal(bits[0], bits[1])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), tree=trees())
def test_walk_of_any_tree(backend, data, tree, device):
    row = st.lists(st.integers(0, 1), min_size=len(tree), max_size=len(tree))
    rows = [(tree, data.draw(row), data.draw(row)) for _ in range(3)]
    parents, tokens, sampled = (torch.tensor(x, device=device) for x in zip(*rows, strict=True))
    path, accepted = tree_walk(parents, tokens.int(), sampled, backend=backend)
    assert (path.dtype, accepted.dtype) == (torch.int32, torch.int32)
    for got_path, got, row in zip(path.tolist(), accepted.tolist(), rows, strict=True):
        assert (got_path, got) == expected_walk(*row)


@pytest.mark.parametrize("backend", BACKENDS)
def test_right_token_under_a_wrong_parent_is_not_accepted(backend, device):
    parents = torch.tensor([[0, 0, 0, 1, 2]], device=device)
    tokens = torch.tensor([[0, 5, 6, 7, 8]], device=device)
    sampled = torch.tensor([[5, 8, 0, 0, 0]], device=device)  # 5 at the root, then 8: but 8 hangs under 6
    path, accepted = tree_walk(parents, tokens, sampled, backend=backend)
    assert path.tolist() == [[0, 1, 2, 3, 4]] and accepted.tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_requests(backend, device):
    none = torch.empty(0, 5, dtype=torch.int64, device=device)
    depth, bits = ancestor_bits(none, backend=backend)
    path, accepted = tree_walk(none, none, none, backend=backend)
    assert depth.shape == bits.shape == path.shape == (0, 5) and accepted.shape == (0,)


def test_bad_arguments_name_what_was_found():
    parents = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"1 to 64 nodes, found \(2, 65\)"):
        ancestor_bits(torch.zeros(2, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be int32 or int64, found torch.float32"):
        ancestor_bits(parents.float())
    with pytest.raises(ValueError, match=r"sampled must have the shape of parents \(2, 5\), found \(2, 4\)"):
        tree_walk(parents, parents, parents[:, :4])
