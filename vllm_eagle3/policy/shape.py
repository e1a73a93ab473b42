"""The shapes that a step can draft: chains and trees of several sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """What each request drafts: `nodes` drafts, at most `depth` deep, with `width` nodes expanded per level (chain: 1).

    A graft of up to `graft` tokens may be among the nodes. It needs no draft step.
    """

    nodes: int
    depth: int
    width: int = 1
    graft: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= self.nodes or self.width < 1:
            raise ValueError(f"a shape needs 0 <= depth <= nodes and width >= 1, found {self}")

    @property
    def family(self) -> int:
        """Shapes of a family share their acceptance. All chains are one family, and each tree size is another."""
        return 0 if self.width == 1 and not self.graft else self.nodes

    @property
    def reach(self) -> int:
        """The most drafts that a verification can accept."""
        return min(self.nodes, max(self.depth, self.graft))


NOTHING = Shape(0, 0)


def shape_name(nodes: int, tree: bool) -> str:
    """The name of a shape in logs and metrics: "none", "chain of 3", "tree of 12"."""
    return f"{'tree' if tree else 'chain'} of {nodes}" if nodes else "none"


# Trees that the policy chooses from, beside the largest one that the options allow: nodes, depth, width. The fewer rows
# a step may verify, the narrower the best tree is (docs/decisions.md).
TREES = (Shape(8, 4, 3), Shape(12, 4, 3), Shape(16, 5, 4), Shape(24, 6, 4), Shape(32, 6, 6), Shape(60, 6, 10))
CHAIN_AND_GRAFT = Shape(7, 3)


def menu(largest: Shape) -> tuple[Shape, ...]:
    """All shapes inside a tree, ascending: nothing, chains up to its depth, the trees of TREES that fit, and itself.

    If the largest tree has grafts, all trees have them, and there is also a short chain with room for a graft. All
    shapes differ in their number of nodes, because vLLM tells a worker only that number.
    """
    grafted = [CHAIN_AND_GRAFT] if largest.graft and largest.depth < CHAIN_AND_GRAFT.nodes else []
    trees = [
        replace(t, graft=largest.graft)
        for t in (*grafted, *TREES)
        if t.nodes < largest.nodes and t.depth <= largest.depth and t.width <= largest.width
    ]
    by_nodes = {shape.nodes: shape for shape in (*chains(range(1, largest.depth + 1)), *trees, largest)}
    return tuple(by_nodes[nodes] for nodes in sorted(by_nodes))


def chains(lengths: Iterable[int]) -> tuple[Shape, ...]:
    """Chains of the given lengths, with K = 0 always among them, in ascending order."""
    return tuple(Shape(k, k) for k in sorted({0, *lengths}))


def at_least_smaller(shapes: Sequence[Shape], seconds: Sequence[float]) -> list[float]:
    """Times of the first shapes, each raised to the largest of the smaller shapes of its kind and of none.

    shapes: ascending, none first. There are two kinds, chains and trees.
    """
    largest = {True: seconds[0], False: seconds[0]}
    raised = []
    for shape, time in zip(shapes, seconds, strict=False):
        is_chain = shape.family == 0
        largest[is_chain] = max(largest[is_chain], time)
        raised.append(largest[is_chain])
    return raised
