"""The shapes that a step can draft: chains and trees of several sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What each request drafts: `nodes` drafts, at most `depth` deep, `width` nodes expanded a level (chain: 1)."""

    nodes: int
    depth: int
    width: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= self.nodes or self.width < 1:
            raise ValueError(f"a shape needs 0 <= depth <= nodes and width >= 1, found {self}")

    @property
    def family(self) -> int:
        """Shapes of a family share their acceptance: all chains do, each tree size has its own."""
        return 0 if self.width == 1 else self.nodes


NOTHING = Shape(0, 0)


def chains(lengths: Iterable[int]) -> tuple[Shape, ...]:
    """Chains of the given lengths, with K = 0 always among them, in ascending order."""
    return tuple(Shape(k, k) for k in sorted({0, *lengths}))
