"""The acceptance rule on hand-drawn trees, and compared with a literal walk (2 s)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.tree.acceptance import accept

#        0
#      / | \
#     1  2  5     tokens: 1:7 2:8 3:9 4:7 5:9 6:9
#     |  |  |
#     3  4  6
PARENTS = torch.tensor([[-1, 0, 0, 1, 2, 0, 5]])
TOKENS = torch.tensor([[-1, 7, 8, 9, 7, 9, 9]])


def run(drawn):
    path, emitted, count = accept(PARENTS, TOKENS, torch.tensor([drawn]))
    n = int(count)
    return path[0].tolist(), emitted[0, :n].tolist()


def test_hand_drawn_tree():
    assert run([8, 0, 7, 0, 5, 0, 0]) == ([0, 2, 4, 3, 4, 5, 6], [8, 7, 5])
    assert run([9, 0, 0, 0, 0, 3, 0]) == ([0, 5, 2, 3, 4, 5, 6], [9, 3])
    assert run([4, 7, 7, 7, 7, 7, 7]) == ([0, 1, 2, 3, 4, 5, 6], [4])
    # 9 is drawn at node 1's parent's level only through node 5, not through node 3 which hangs under node 1.
    assert run([7, 9, 0, 2, 0, 0, 0]) == ([0, 1, 3, 3, 4, 5, 6], [7, 9, 2])


def test_unused_and_placeholder_nodes_match_nothing():
    parents, tokens = torch.tensor([[-1, -1, 0]]), torch.tensor([[-1, 0, -1]])
    path, emitted, count = accept(parents, tokens, torch.tensor([[0, 1, 2]]))
    assert (path.tolist(), emitted[0, 0].item(), count.item()) == ([[0, 1, 2]], 0, 1)


@st.composite
def trees(draw):
    nodes = draw(st.integers(1, 20))
    parents = [-1] + [draw(st.sampled_from([-1, *range(i)])) for i in range(1, nodes)]
    tokens = draw(st.lists(st.integers(-1, 4), min_size=nodes, max_size=nodes))
    drawn = draw(st.lists(st.integers(0, 4), min_size=nodes, max_size=nodes))
    return parents, tokens, drawn


@settings(max_examples=500, deadline=None)
@given(trees())
def test_against_a_literal_walk(tree):
    parents, tokens, drawn = tree
    path, emitted, count = accept(*(torch.tensor([column]) for column in tree))
    node, expected_path, expected = 0, [0], [drawn[0]]
    while True:
        children = [i for i in range(1, len(parents)) if parents[i] == node and tokens[i] == drawn[node]]
        if not children:
            break
        node = children[0]
        expected_path.append(node)
        expected.append(drawn[node])
    n = int(count)
    assert emitted[0, :n].tolist() == expected
    assert path[0].tolist() == expected_path + list(range(n, len(parents)))
