"""How many drafts get accepted: estimates per depth, expected tokens, and the batch's budget of drafts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vllm_eagle3.policy.shape import Shape


def expected_tokens(rates: Sequence[float], depth: int) -> float:
    """Tokens a request gains in a step that verifies `depth` drafts (tau).

    That is 1 + the sum over the drafts of their probability of acceptance, which is the product of the conditional
    `rates` up to and including the draft's depth.
    """
    tokens = survival = 1.0
    for rate in rates[:depth]:
        survival *= rate
        tokens += survival
    return tokens


class Acceptance:
    """Conditional acceptance per depth, P(draft d accepted | drafts before it accepted). Recent steps have more weight.

    A depth counts only the requests that reached it. Its prior (`weight` observations) is the rate of the depth before
    it: EAGLE-3's acceptance falls slowly with depth, so an unknown depth looks like the one before it and is tried.
    Counts decay with the number of observations (`window`), but not faster than over `min_steps` steps.
    """

    def __init__(
        self,
        max_depth: int,
        prior: float | None = 0.6,
        window: float = 64.0,
        min_steps: int = 12,
        weight: float = 2.0,
    ) -> None:
        self.window, self.min_steps, self.weight = window, min_steps, weight
        self._tried = [0.0] * max_depth
        self._accepted = [0.0] * max_depth
        if prior is not None and max_depth:  # the prior of the first depth decays as observations do
            self._tried[0], self._accepted[0] = 6.0, 6.0 * prior

    def observe(self, drafted: Sequence[int], accepted: Sequence[int], keep: float = 1.0) -> None:
        """Learn from one step: how deep each request drafted, and how many drafts were accepted.

        keep: the largest share of the earlier counts that is kept; it is lower for a probe after a long pause.
        """
        self.observe_counts(Counter(zip(drafted, accepted, strict=True)), keep)

    def observe_counts(self, counts: Mapping[tuple[int, int], int], keep: float = 1.0) -> None:
        """One step, as how many requests had which (depth drafted, drafts accepted): there are few different ones."""
        deepest = len(self._tried)
        tried, passed = [0] * deepest, [0] * deepest  # at each depth
        for (depth, good), requests in counts.items():
            for level in range(min(good + 1, depth, deepest)):
                tried[level] += requests
            for level in range(min(good, depth, deepest)):
                passed[level] += requests
        keep = min(keep, 1.0 - min(tried[0] / self.window, 1.0 / self.min_steps))
        self._tried = [keep * old + new for old, new in zip(self._tried, tried, strict=True)]
        self._accepted = [keep * old + new for old, new in zip(self._accepted, passed, strict=True)]

    def rates(self, like: Sequence[float] = ()) -> list[float]:
        """Conditional acceptance at depth 1, 2, ..., in [0, 1]. `like` replaces the priors of its depths."""
        out: list[float] = []
        for depth, (tried, accepted) in enumerate(zip(self._tried, self._accepted, strict=True)):
            above = out[-1] if out else accepted / max(tried, 1e-9)
            prior = like[depth] if depth < len(like) else above
            out.append((accepted + self.weight * prior) / (tried + self.weight))
        return out


class Families(dict[int, Acceptance]):
    """Acceptance of each family of shapes: 0 for all chains, and each size of tree by its number of nodes."""

    # Guess: a tree of n nodes misses MISSES * n ** MISSES_POWER times as often as a chain (16: 0.75, 60: 0.6).
    MISSES, MISSES_POWER = 1.2, -0.17
    TREE_PRIOR = 12.0  # observations that this is worth

    def __init__(self, families: Iterable[int], max_depth: int, prior: float) -> None:
        """prior: the acceptance of the first family before anything was seen."""
        first, *others = sorted(set(families))
        weight = self.TREE_PRIOR if first == 0 else 2.0
        super().__init__({first: Acceptance(max_depth, prior)})
        self.update({family: Acceptance(max_depth, None, weight=weight) for family in others})

    def rates(self) -> dict[int, list[float]]:
        """Acceptance per depth of each family.

        A tree that was seldom seen is expected to fail less often than a chain, by a factor that falls with its nodes.
        Without chains it counts as good as the next smaller tree.
        """
        out: dict[int, list[float]] = {}
        below: list[float] = []
        for family, acceptance in self.items():
            if family and 0 in out:
                misses = min(self.MISSES * family**self.MISSES_POWER, 1.0)
                below = [1.0 - (1.0 - rate) * misses for rate in out[0]]
            below = out[family] = acceptance.rates(below if family else ())
        return out


class Kinds(dict[bool, Families]):
    """Acceptance of requests that do not sample (False) and of those that do, whose drafts are accepted less often."""

    SAMPLED_PRIOR = 0.7  # guess: share of the acceptance that is left where requests sample

    def __init__(self, families: Iterable[int], max_depth: int, prior: float) -> None:
        """As Families; prior: of requests that do not sample."""
        families = list(families)
        super().__init__({samples: Families(families, max_depth, prior * (self.SAMPLED_PRIOR if samples else 1.0))
                          for samples in (False, True)})  # fmt: skip

    def expected_tokens(self, shapes: Iterable[Shape], sampling_share: float) -> dict[int, float]:
        """Tokens a request gains in a step with each shape, by its nodes, where such a share of the batch samples."""
        shares = {False: 1.0 - sampling_share, True: sampling_share}
        rates = {samples: families.rates() for samples, families in self.items() if shares[samples]}

        def expected(shape: Shape) -> float:
            return sum(
                shares[kind] * expected_tokens(of.get(shape.family, ()), shape.reach)
                for kind, of in rates.items()
            )

        return {shape.nodes: expected(shape) for shape in shapes}


def shift_odds(rates: np.ndarray, own: np.ndarray, mean: np.ndarray | float) -> np.ndarray:
    """The batch's per-depth `rates`, with their odds multiplied by a request's odds over the mean odds."""
    eps = 1e-3
    p, q, m = (np.clip(x, eps, 1 - eps) for x in (rates, own, mean))
    odds = p / (1 - p) * (q / (1 - q)) * ((1 - m) / m)
    return odds / (1 + odds)


def request_survivals(rates: np.ndarray, counts: np.ndarray, weight: float) -> np.ndarray:
    """Probability [requests, depth] that a request accepts its drafts up to each depth.

    rates: [requests, depth], conditional rates of its kind. counts: [requests, 2], drafts that it tried and accepted
    itself. weight: observations that the rates of its kind count as, beside those.
    """
    mean = rates.mean(axis=1)
    own = (counts[:, 1] + weight * mean) / (counts[:, 0] + weight)
    return np.cumprod(shift_odds(rates, own[:, None], mean[:, None]), axis=1)


def allocate(survivals: np.ndarray, seconds: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """How many drafts of each request to verify: the n most likely ones, for the n with the most tokens per second.

    The rule is that of TETRIS (arXiv 2502.15197), with the budget n found from the cost.

    survivals: [requests, depth], probability of acceptance. Non-increasing along depth, so that the best n drafts are
        always prefixes. Entries for missing drafts must be negative.
    seconds: [drafts + 1], time of a step that verifies n drafts in all, n from 0 to the number of drafts.
    margin: all drafts are verified unless verifying fewer is faster by more than this share.
    Returns [requests], the number of drafts to verify for each.
    """
    requests, depth = survivals.shape
    order = np.argsort(-survivals.ravel(), kind="stable")[: len(seconds) - 1]
    tokens = requests + np.concatenate([[0.0], np.cumsum(survivals.ravel()[order])])
    speeds = tokens / seconds
    budget = int(np.argmax(speeds))
    if speeds[budget] <= (1.0 + margin) * speeds[-1]:
        budget = len(order)
    return np.bincount(order[:budget] // depth, minlength=requests)
