"""The time of a decode step: a model of its parts, and the correction of this model by observed times.

All times are in seconds. Nothing here uses vLLM.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

Curve = dict[int, float]  # size (tokens or rows) -> seconds


def interpolate(curve: Mapping[int, float], size: float) -> float:
    """Piecewise linear through the points of `curve`. Outside of them the slopes at its ends continue (never below 0).

    Raises ValueError for an empty curve.
    """
    if not curve:
        raise ValueError("a cost curve needs at least one point, found none")
    xs = sorted(curve)
    if len(xs) == 1:
        return curve[xs[0]]
    hi = min(max(bisect_right(xs, size), 1), len(xs) - 1)
    x0, x1 = xs[hi - 1], xs[hi]
    slope = (curve[x1] - curve[x0]) / (x1 - x0)
    return max(curve[x0] + slope * (size - x0), 0.0)


@dataclass(frozen=True)
class StepCostModel:
    """Seconds of the parts of a step. `SeenCost` corrects it, so only the ratios of its parts have to be plausible.

    target: context length -> (tokens in the step -> seconds of the target's step, sampling included)
    sync: tokens in the step -> seconds of the draft's pass over them, which every step takes, also at K = 0
    draft: rows -> seconds of one autoregressive draft step
    overhead: seconds that every step takes (scheduler, host)
    """

    target: dict[int, Curve]
    sync: Curve
    draft: Curve
    overhead: float = 0.0

    def __post_init__(self) -> None:
        curves = [("sync", self.sync), ("draft", self.draft)]
        curves += [(f"target at context {c}", curve) for c, curve in self.target.items()]
        if not self.target:
            raise ValueError(
                "step cost model: expected at least one context length under 'target', found none"
            )
        for name, curve in curves:
            if not curve or min(curve) < 1 or not all(0.0 <= s < math.inf for s in curve.values()):
                raise ValueError(
                    f"step cost model: '{name}' must map sizes >= 1 to seconds >= 0, found {curve}"
                )

    def target_step(self, tokens: float, context: float) -> float:
        """Seconds of the target's step over `tokens` tokens, requests `context` tokens long on average."""
        by_context = {c: interpolate(curve, tokens) for c, curve in self.target.items()}
        return interpolate(by_context, max(context, min(by_context)))

    def step(self, tokens: float, draft_rows: float, depth: float, context: float = 0.0) -> float:
        """Seconds of a decode step that verifies and drafts.

        tokens: rows the target sees (requests + drafts to verify); draft_rows: rows of each draft step;
        depth: draft steps (0: only the sync pass; it also gives the first draft, so d drafts take d-1 more).
        """
        drafting = max(depth - 1, 0) * interpolate(self.draft, draft_rows)
        return self.overhead + self.target_step(tokens, context) + interpolate(self.sync, tokens) + drafting

    @classmethod
    def guess(cls) -> StepCostModel:
        """Plausible ratios in an arbitrary unit."""
        return cls({0: {1: 1.0, 64: 2.0}}, sync={1: 0.05, 64: 0.1}, draft={1: 0.1, 64: 0.15})


def bucket(batch: int) -> int:
    """Batches 1, 2, 3-4, 5-8, 9-16, ... share their observations."""
    return max(batch - 1, 0).bit_length()


class SeenCost:
    """A StepCostModel times the ratio of observed to predicted time, per cell: (batch bucket, number of drafts).

    The ratio is that of the summed times, without outliers (a compilation, a preempted core): steps whose ratio is less
    than half or more than twice the median. A cell without observations within the last `max_age` is forgotten, so that
    a cell with unlucky times is tried again. A cell without observations takes the ratio of the nearest cell. While
    steps of one cell follow each other, a change of their time says nothing about that cell: it changes the level of
    all cells (contexts grow, the machine slows down).
    """

    MIN_SAMPLES = 3
    WINDOW = 61  # ratios a cell remembers
    STREAK = 31  # steps in a row that count for their own cell; further ones change the level of all
    LEVEL_GAIN, LEVEL_CLIP = 0.1, 0.5  # of the logarithm of observed over predicted

    def __init__(self, model: StepCostModel, max_age: int = 2000) -> None:
        self.model, self.max_age = model, max_age
        self._ratios: dict[tuple[int, int], deque[tuple[float, float]]] = {}  # ratio, uncorrected seconds
        self._last: dict[tuple[int, int], int] = {}  # observation number of the newest ratio
        self._typical: dict[tuple[int, int], float] = {}  # of the cells with enough ratios
        self._count = 0
        self._level = 1.0
        self._streak: tuple[tuple[int, int] | None, int] = (None, 0)
        self._step = lru_cache(maxsize=1 << 16)(model.step)

    def base(self, tokens: float, rows: int, depth: float, context: float) -> float:
        """Uncorrected seconds by the model, with contexts rounded to multiples of 64."""
        return max(self._step(tokens, rows, depth, 64.0 * round(context / 64)), 1e-9)

    def observe(self, batch: int, drafts: int, base: float, seconds: float) -> None:
        """Learn from a pure decode step that both verified and made `drafts` drafts a request.

        base: `base` of the work that the step really did, which is less if drafting stopped early.
        """
        if seconds <= 0.0:
            raise ValueError(f"a step takes more than 0 seconds, found {seconds}")
        self._count += 1
        cell = (bucket(batch), drafts)
        ratio = seconds / base / self._level
        before, length = self._streak
        self._streak = (cell, length + 1 if cell == before else 1)
        self._last[cell] = self._count
        if self._streak[1] > self.STREAK:
            off = math.log(ratio / self._typical[cell])
            self._level *= math.exp(self.LEVEL_GAIN * min(max(off, -self.LEVEL_CLIP), self.LEVEL_CLIP))
        else:
            ratios = self._ratios.setdefault(cell, deque(maxlen=self.WINDOW))
            ratios.append((ratio, base))
            if len(ratios) >= self.MIN_SAMPLES:
                median = statistics.median(r for r, _ in ratios)
                kept = [(r, b) for r, b in ratios if 0.5 * median <= r <= 2.0 * median]
                self._typical[cell] = sum(r * b for r, b in kept) / sum(b for _, b in kept)
        for old in [c for c, last in self._last.items() if self._count - last > self.max_age]:
            del self._ratios[old], self._last[old]
            self._typical.pop(old, None)

    def known(self, batch: int, drafts: int) -> bool:
        """Whether enough steps of this cell were seen lately."""
        return (bucket(batch), drafts) in self._typical

    def correction(self, batch: int, drafts: int) -> float:
        """Observed over predicted time: of this cell, else of the cell nearest in batch, then in drafts, else 1."""
        if not self._typical:
            return self._level
        here = bucket(batch)
        own = self._typical.get((here, drafts))
        if own is None:
            own = self._typical[min(self._typical, key=lambda c: (abs(c[0] - here), abs(c[1] - drafts)))]
        return own * self._level

    @property
    def observations(self) -> int:
        """Steps seen since the start."""
        return self._count

    def to_json(self) -> dict[str, float]:
        """Corrections as {"bucket,drafts": ratio}."""
        return {f"{b},{k}": ratio * self._level for (b, k), ratio in self._typical.items()}

    def from_json(self, seen: Mapping[str, float]) -> None:
        """Start from corrections saved earlier, which new observations replace.

        Raises ValueError, TypeError or AttributeError for anything that `to_json` does not write.
        """
        for name, ratio in seen.items():
            b, k = (int(part) for part in name.split(","))
            if not 0.0 < ratio < math.inf:
                raise ValueError(f"expected a correction above 0 for '{name}', found {ratio}")
            self._ratios[b, k] = deque([(ratio, 1.0)] * self.MIN_SAMPLES, maxlen=self.WINDOW)
            self._last[b, k], self._typical[b, k] = 0, ratio
