"""The menu of shapes, and how the policy chooses among chains and trees (5 s)."""

from dataclasses import replace

import numpy as np
import pytest

from vllm_eagle3.policy.acceptance import expected_tokens
from vllm_eagle3.policy.cost import SeenCost, StepCostModel
from vllm_eagle3.policy.policy import Policy
from vllm_eagle3.policy.shape import NOTHING, Shape, chains, menu, shape_name

LARGEST = Shape(60, 6, 10)


def test_the_menu_with_grafts():
    """Trees have room for a graft, and so has a short chain; chains themselves stay what they are."""
    shapes = {s.nodes: s for s in menu(replace(LARGEST, graft=8))}
    assert shapes[7] == Shape(7, 3, 1, graft=8) and shapes[7].family == 7 and shapes[7].reach == 7
    assert shapes[5] == Shape(5, 5) and shapes[5].family == 0
    assert shapes[16] == Shape(16, 5, 4, graft=8) and shapes[16].reach == 8
    assert [s for s in shapes.values() if s.graft == 0] == list(chains(range(1, 7)))
    assert 7 not in {s.nodes for s in menu(replace(Shape(6, 3, 3), graft=8))}  # no room


def test_the_whole_menu():
    trees = (Shape(8, 4, 3), Shape(12, 4, 3), Shape(16, 5, 4), Shape(24, 6, 4), Shape(32, 6, 6), LARGEST)
    assert menu(LARGEST) == (*chains(range(1, 7)), *trees)


@pytest.mark.parametrize(
    "largest",
    [Shape(16, 5, 4), Shape(13, 4, 2), Shape(6, 6, 3), Shape(4, 2, 2), Shape(1, 1, 4), Shape(62, 16, 32)],
)
def test_shapes_lie_within_the_largest(largest):
    shapes = menu(largest)
    assert shapes[0] == NOTHING
    assert shapes[-1] == largest
    assert len({shape.nodes for shape in shapes}) == len(shapes)
    assert all(
        s.nodes <= largest.nodes and s.depth <= largest.depth and s.width <= largest.width for s in shapes
    )


def tree_rates(chain: float, nodes: int) -> list[float]:
    """A tree misses less often than a chain, as measured with the shipped head."""
    return [1 - (1 - chain) * min(1.1 * nodes**-0.15, 1)] * 6


@pytest.mark.parametrize(
    ("row_ms", "chain", "wanted"),
    [
        (0.05, 0.6, "tree"),  # rows cost next to nothing beside a step of 20 ms
        (4.0, 0.6, "chain"),  # each row costs a fifth of a step
        (4.0, 0.05, "nothing"),
    ],
)
def test_chooses_the_kind_that_pays(row_ms, chain, wanted):
    """Simulated steps of one request: 20 ms, `row_ms` more for each row, and 1 ms a draft step."""
    rng = np.random.default_rng(0)
    policy = Policy(SeenCost(StepCostModel.guess()), menu(LARGEST))
    before, tokens, seconds, kinds = NOTHING, 0.0, 0.0, []
    for step in range(600):
        shape = policy.choose(1)
        rates = [chain] * 6 if before.width == 1 else tree_rates(chain, before.nodes)
        hits = rng.random(before.depth) < rates[: before.depth]
        accepted = int(np.cumprod(hits).sum())
        if before != NOTHING:
            policy.observe_accepted({"r": (before.nodes, accepted)})
        took = 0.020 + 1e-3 * row_ms * before.nodes + 1e-3 * shape.depth
        if before == shape:
            seen = took * float(np.exp(0.03 * rng.normal()))
            policy.observe_seconds(1, shape, 0.0, seen, shape.nodes, shape.depth)
        if step >= 300:
            tokens, seconds = tokens + 1 + accepted, seconds + took
            kinds.append("nothing" if shape == NOTHING else "chain" if shape.width == 1 else "tree")
        before = shape
    best = max(
        expected_tokens([chain] * 6 if s.width == 1 else tree_rates(chain, s.nodes), s.depth)
        / (0.020 + 1e-3 * row_ms * s.nodes + 1e-3 * s.depth)
        for s in menu(LARGEST)
    )
    assert kinds.count(wanted) >= 0.8 * len(kinds), {kind: kinds.count(kind) for kind in set(kinds)}
    assert tokens / seconds >= 0.93 * best


def test_names_for_operators():
    assert shape_name(0, tree=False) == shape_name(0, tree=True) == "none"
    assert shape_name(3, tree=False) == "chain of 3" and shape_name(12, tree=True) == "tree of 12"
