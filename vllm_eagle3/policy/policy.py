"""How much to draft: chooses the shape of a step, or no drafts, that gives the most tokens per second.

Expected tokens come from measured acceptance, step times from `cost.SeenCost`. Pure Python, no engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul

import numpy as np

from vllm_eagle3.policy.acceptance import Acceptance, Kinds, allocate, request_survivals
from vllm_eagle3.policy.cost import SeenCost, bucket
from vllm_eagle3.policy.shape import NOTHING, Shape, at_least_smaller


class Policy:
    """Chooses one shape per step for the whole batch.

    `best` is the shape with the highest batch * expected tokens / step time. It is never larger than the best shape of
    a smaller batch with the same acceptance: a higher load never drafts more.

    `choose` is `best` with hysteresis for larger shapes, and with probes that take at most `probe_share` of the time.
    At K = 0 a few requests sometimes draft the smallest shape for one step, so that drafting can begin again. Otherwise
    a neighbouring shape whose cost was not seen lately is used for a few steps.
    """

    TIE = 0.005
    PROBE_REQUESTS = 8  # at K = 0 one request in 8 probes
    PROBE_KEEP = 0.75  # share of the earlier acceptance counts that such a probe keeps
    MAX_CREDIT = 8.0  # the most steps of probing that can be saved
    PROBE_LOSS = 0.1  # the least cost of such a probe, in steps per probing request
    DOUBTFUL_LOSS = 0.5  # the same while hardly any draft is accepted: about one step in 70 is a probe
    PROBE_FLOOR = 0.8  # neighbours expected to be slower than this share of the current speed are not probed

    REQUEST_WINDOW = 32.0  # drafts over which a request's own acceptance is measured
    REQUEST_PRIOR = 8.0  # weight of the batch's acceptance beside a request's own, in observations

    def __init__(
        self,
        cost: SeenCost,
        shapes: Sequence[Shape],
        hysteresis: float = 0.01,
        probe_share: float = 0.007,
        prior: float = 0.6,
    ) -> None:
        if NOTHING not in shapes or len({s.nodes for s in shapes}) != len(shapes):
            raise ValueError(
                f"shapes must hold {NOTHING} and differ in their number of nodes, found {shapes}"
            )
        self.shapes = sorted(shapes, key=lambda s: s.nodes)
        self.by_nodes = {s.nodes: s for s in self.shapes}
        self.cost = cost
        self.hysteresis, self.probe_share = hysteresis, probe_share
        depth = max(s.reach for s in self.shapes)
        self.kinds = Kinds([s.family for s in self.shapes if s != NOTHING] or [0], depth, prior)
        self.acceptance = self.kinds[False]
        self.sampling: set[str] = set()  # requests that sample, told by the scheduler
        self.sampling_share = 0.0  # of the batch
        self.draws = (
            False  # whether their drafts are drawn: what is verified must then not depend on what was drawn
        )
        self.continuation = Acceptance(max(depth - 1, 0), prior=1.0)
        """Whether chains continue after each draft: the draft stops a chain early that it finds improbable."""
        self.follows_requests = True  # whether `lengths` will need each request's own acceptance
        self.requests: dict[str, tuple[float, float]] = {}  # drafts tried and accepted; older ones count less
        self._verified: dict[int, float] = {}  # nodes of a tree that are used, by nodes
        self._gains: dict[int, float] = {}  # by nodes, until the next observation
        self._shares: list[float] = []  # of _continuation_shares, until the next observation
        self.current: Shape | None = None
        self._credit: float | None = None  # seconds that probes may cost; the first choice grants two steps
        self._probe: Shape | None = None
        self._probe_left = 0  # further steps of the probe
        self.doubtful = False  # whether hardly any draft was accepted lately
        self.probing = False  # whether the last choice is a probe at K = 0, which only a few requests verify
        self.countable = (
            True  # whether the time of the next step can be learned from: shapes are explored only then
        )
        self._turn = 0  # rotates the probing requests
        self._tries: dict[tuple[int, int], int] = {}

    # -- Expected tokens and seconds

    def gain(self, shape: Shape) -> float:
        """Expected tokens of a request in a step with this shape, over the batch of the last choice."""
        if not self._gains:
            self._gains = self.kinds.expected_tokens(self.shapes, self.sampling_share)
        return self._gains[shape.nodes]

    def expected_drafts(self, shape: Shape, batch: int) -> tuple[float, float]:
        """Expected drafts a request and draft steps of the batch with this shape, where chains may stop early.

        Both are rounded, to limit the lookups of cost.
        """
        if shape.family or shape.depth < 2:
            return self._verified.get(shape.nodes, shape.nodes), shape.depth
        shares = self._continuation_shares()[: shape.depth - 1]
        steps = sum(1.0 - (1.0 - share) ** batch for share in shares)
        rows = 8 * batch
        return round(rows + rows * sum(shares)) / rows, round(8 + 8 * steps) / 8

    def _continuation_shares(self) -> list[float]:
        """Share of chains that continue after 1, 2, ... drafts."""
        if not self._shares:
            self._shares = list(accumulate(self.continuation.rates(), mul))
        return self._shares

    def seconds(self, shape: Shape, batch: int, context: float) -> float:
        """Expected seconds of a step with this shape."""
        base = self._base(shape, batch, context, *self.expected_drafts(shape, batch))
        return base * self.cost.correction(batch, shape.nodes)

    def _base(self, shape: Shape, batch: int, context: float, verified: float, steps: float) -> float:
        """Uncorrected seconds of a step that verifies `verified` drafts a request and takes `steps` draft steps."""
        return self.cost.base(batch * (verified + 1), batch * shape.width, steps, context)

    def best(self, batch: int, context: float = 0.0) -> Shape:
        """The smallest shape within TIE of the most expected tokens per second.

        Among chains, and among trees, the step of a larger one never counts as shorter, even if noise made it look so.
        """
        gains = [self.gain(s) for s in self.shapes]
        factors = [self.cost.correction(batch, s.nodes) for s in self.shapes]
        allowed = len(self.shapes)
        for load in sorted({1 << i for i in range(bucket(batch))} | {batch}):
            seconds = [
                factor * self._base(shape, load, context, *self.expected_drafts(shape, load))
                for factor, shape in zip(factors, self.shapes[:allowed], strict=False)
            ]
            raised = at_least_smaller(self.shapes, seconds)
            speeds = [gain / time for gain, time in zip(gains, raised, strict=False)]
            allowed = next(i for i, speed in enumerate(speeds, 1) if speed >= (1.0 - self.TIE) * max(speeds))
        return self.shapes[allowed - 1]

    # -- The choice

    def expect(self, sampling_share: float) -> None:
        """Tell, before `choose`, what share of the batch samples."""
        if sampling_share != self.sampling_share:
            self.sampling_share, self._gains = sampling_share, {}

    def choose(self, batch: int, context: float = 0.0) -> Shape:
        """The shape to draft in this step, for `batch` >= 1 requests `context` tokens long on average."""
        missing = self._unexplored(batch, context) if self.countable else None
        if missing is not None:
            return missing
        best = self.best(batch, context)
        if (
            self.current is None
            or best.nodes < self.current.nodes
            or self._clearly_better(best, batch, context)
        ):
            self.current = best
        now = self.seconds(self.current, batch, context)
        credit = 2.0 * now if self._credit is None else self._credit + self.probe_share * now
        self._credit = min(credit, self.MAX_CREDIT * now)
        if self._probe_left:
            self._probe_left -= 1
        else:
            self._start_probe(batch, context, now)
        return self._probe or self.current

    def _clearly_better(self, shape: Shape, batch: int, context: float) -> bool:
        assert self.current is not None
        ratio = self.gain(shape) / self.gain(self.current)
        return ratio * self.seconds(self.current, batch, context) > (
            (1.0 + self.hysteresis) * self.seconds(shape, batch, context)
        )

    def _unexplored(self, batch: int, context: float) -> Shape | None:
        """The next shape to explore in this batch bucket: each a few times, the smallest first, until one is slower."""
        fastest = 0.0
        for shape in self.shapes:
            tries = self._tries.get((bucket(batch), shape.nodes), 0)
            if not self.cost.known(batch, shape.nodes) and tries < 2 * SeenCost.MIN_SAMPLES:
                self._tries[bucket(batch), shape.nodes] = tries + 1
                return shape
            speed = self.gain(shape) / self.seconds(shape, batch, context)
            if speed < self.PROBE_FLOOR * fastest:
                return None
            fastest = max(fastest, speed)
        return None

    def _start_probe(self, batch: int, context: float, now: float) -> None:
        """Start the next probe if one is useful and the saved time covers its greatest possible cost."""
        assert self.current is not None and self._credit is not None
        self._probe, self.probing = None, False
        at = self.shapes.index(self.current)
        steps = SeenCost.MIN_SAMPLES + 1  # the first one verifies what was drafted before
        for shape in self.shapes[max(at - 1, 0) : at + 2]:
            if shape == self.current or self.cost.known(batch, shape.nodes):
                continue
            gain, seconds = self.gain(shape) / self.gain(self.current), self.seconds(shape, batch, context)
            loss = steps * (seconds - min(gain, 1.0) * now)
            if gain * now >= self.PROBE_FLOOR * seconds and self._pay(loss):
                self._probe, self._probe_left = shape, steps - 1
                return
        if self.current == NOTHING and len(self.shapes) > 1:
            shape = self.shapes[1]
            few = batch + shape.nodes * self._probers(batch)
            seconds = self.cost.base(few, batch * shape.width, shape.depth, context)
            # What drafting costs here is known from steps that drafted. Steps without drafts alone would say that a
            # probe costs nothing wherever a row more does, and every other step would be one.
            correction = max(self.cost.correction(batch, nodes) for nodes in (0, shape.nodes))
            share = now * self._probers(batch) / batch
            least = share * (self.DOUBTFUL_LOSS if self.doubtful else self.PROBE_LOSS)
            if self._pay(max(seconds * correction - now, least)):
                self._probe, self.probing = shape, True
                self._turn += self._probers(batch)

    def _pay(self, loss: float) -> bool:
        assert self._credit is not None
        if loss > self._credit:
            return False
        self._credit -= max(loss, 0.0)
        return True

    def _probers(self, batch: int) -> int:
        return -(-batch // self.PROBE_REQUESTS)

    # -- Observations

    def observe_accepted(self, results: Mapping[str, tuple[int, int]]) -> None:
        """Learn from one verification: request id -> (nodes verified, drafts accepted). 0 nodes are ignored."""
        self._gains = {}
        seen: dict[tuple[bool, int], Counter[tuple[int, int]]] = {}
        reach: dict[int, int] = {}  # of the shapes that count, by nodes
        same = Counter((request in self.sampling, *pair) for request, pair in results.items())
        for (samples, nodes, accepted), requests in same.items():
            shape = self.by_nodes.get(nodes) or Shape(nodes, nodes)  # a cut chain
            if nodes and shape.family in self.acceptance:
                reach[nodes] = shape.reach
                seen.setdefault((samples, shape.family), Counter())[shape.reach, accepted] += requests
        for (samples, family), counts in seen.items():
            left = self.PROBE_KEEP if self.current == NOTHING else 1.0
            self.kinds[samples][family].observe_counts(counts, left)
        for request, (nodes, accepted) in results.items() if self.follows_requests else ():
            if nodes in reach:
                tried, good = self.requests.get(request, (0.0, 0.0))
                reached = min(accepted + 1, reach[nodes])
                keep = max(1.0 - reached / self.REQUEST_WINDOW, 0.0)
                self.requests[request] = (tried * keep + reached, good * keep + accepted)

    def observe_lengths(self, shape: Shape, lengths: Sequence[int]) -> None:
        """Learn how many drafts each request of a batch of this shape got. There are fewer if chains stopped early."""
        if shape.family == 0 and shape.depth > 1:
            self._shares = []
            self.continuation.observe([shape.depth - 1] * len(lengths), [max(n - 1, 0) for n in lengths])

    def observe_seconds(
        self, batch: int, shape: Shape, context: float, seconds: float, verified: float, steps: int
    ) -> None:
        """Learn the time of a step that only decoded, and verified and drafted `shape` for each of `batch` requests.

        Where chains stopped early, it verified only `verified` drafts a request and took only `steps` draft steps.
        """
        if shape.family:  # rounded, to limit the lookups of cost
            mean = self._verified.get(shape.nodes, verified)
            self._verified[shape.nodes] = round(8 * (mean + 0.2 * (verified - mean))) / 8
        base = self._base(shape, batch, context, verified, steps)
        self.cost.observe(batch, shape.nodes, base, seconds)

    def forget(self, request: str) -> None:
        """Drop a finished request."""
        self.requests.pop(request, None)
        self.sampling.discard(request)

    # -- The batch's budget

    def lengths(
        self,
        requests: Sequence[str],
        shape: Shape,
        context: float = 0.0,
        drafted: Sequence[int] | None = None,
    ) -> list[int]:
        """How many of the `drafted` drafts to verify. Of trees, of a single request, and where they are drawn: all."""
        drafted = [shape.nodes] * len(requests) if drafted is None else drafted
        if self.probing:
            first, few = self._turn, self._probers(len(requests))
            return [n * ((i - first) % len(requests) < few) for i, n in enumerate(drafted)]
        if shape.family or shape == NOTHING or len(requests) <= 1:
            return list(drafted)
        kinds = {samples: self.kinds[samples][0].rates()[: shape.depth] for samples in self.kinds}
        rates = np.array([kinds[request in self.sampling] for request in requests])
        counts = np.array([self.requests.get(r, (0.0, 0.0)) for r in requests])
        table = request_survivals(rates, counts, self.REQUEST_PRIOR)
        # Probabilities that a draft is made and accepted, divided by those that it is made.
        shares = np.array([1.0, *self._continuation_shares()[: shape.depth - 1]])
        table = np.minimum.accumulate(np.minimum(table / np.maximum(shares, 1e-6), 1.0), axis=1)
        made, whole = np.array(drafted), np.array([self.draws and r in self.sampling for r in requests])
        table[(np.arange(shape.depth) >= made[:, None]) | whole[:, None]] = -1.0
        fewest = len(requests) + int(made[whole].sum())
        sizes = range(fewest, fewest + int(made[~whole].sum()) + 1)
        seconds = [self.cost.base(n, len(requests), shape.depth, context) for n in sizes]
        return np.where(whole, made, allocate(table, np.array(seconds), self.hysteresis)).tolist()
