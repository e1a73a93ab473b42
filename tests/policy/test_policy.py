"""The cost policy against a simulator, and the properties it promises. About 40 s on one core."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.policy.acceptance import Acceptance, allocate, expected_tokens
from vllm_eagle3.policy.cost import SeenCost, StepCostModel
from vllm_eagle3.policy.policy import Policy
from vllm_eagle3.policy.shape import NOTHING, Shape, chains

K_MAX = 7
TABLES = {  # seconds, of the kind seen on two CPU cores, on a large GPU, and where tokens are never free
    "cpu": StepCostModel(
        {0: {1: 0.020, 16: 0.026, 64: 0.060, 256: 0.21}},
        {1: 0.0015, 64: 0.003, 256: 0.01},
        {1: 0.0012, 64: 0.002},
    ),
    "gpu": StepCostModel(
        {0: {1: 0.006, 128: 0.0066, 256: 0.008, 512: 0.013, 1024: 0.025}},
        {1: 0.0003, 512: 0.0008},
        {1: 0.0003, 256: 0.0004},
    ),
    "bad": StepCostModel(
        {0: {1: 0.020, 16: 0.06, 64: 0.2, 256: 0.8}}, {1: 0.003, 64: 0.006, 256: 0.01}, {1: 0.004, 64: 0.008}
    ),
}
CURVES = {  # conditional acceptance per depth
    "published": [0.78, 0.74, 0.74, 0.67, 0.83, 0.58, 0.57],  # of the cumulative 0.78, 0.58, 0.43, 0.29, ...
    "mid": [0.5] * K_MAX,
    "low": [0.15] * K_MAX,
    "zero": [0.0] * K_MAX,
    "perfect": [0.95] * K_MAX,
    "cliff": [0.9, 0.9] + [0.05] * (K_MAX - 2),
}


@dataclass
class Run:
    """What a simulated run gave: expected tokens, true seconds, the choices, seconds spent on probes."""

    tokens: float = 0.0
    seconds: float = 0.0
    choices: list[Shape] = field(default_factory=list)


def simulate(
    policy: Policy,
    table: StepCostModel,
    batch: int,
    curve: list[float],
    steps: int,
    rng: np.random.Generator,
    lengths: list[int] | None = None,
    noise: float = 0.05,
) -> Run:
    """Serve `steps` decode steps: drafts chosen in one step are verified in the next, as in vLLM.

    Observed times carry 5 % noise and one step in 100 takes ten times as long. `lengths`: what is verified
    first, and on return what the next step would verify.
    """
    ids = [str(i) for i in range(batch)]
    lengths = [0] * batch if lengths is None else lengths
    run = Run()
    for _ in range(steps):
        shape = policy.choose(batch)
        run.choices.append(shape)
        cut = policy.lengths(ids, shape) if policy.probing else [shape.nodes] * batch
        seconds = table.step(batch + sum(lengths), batch, shape.depth)
        run.seconds += seconds
        run.tokens += sum(expected_tokens(curve, k) for k in lengths)
        if any(lengths):
            hits = rng.random((batch, max(lengths))) < np.array(curve[: max(lengths)])
            accepted = np.minimum(np.cumprod(hits, 1).sum(1), lengths)
            results = zip(ids, lengths, accepted.tolist(), strict=True)
            policy.observe_accepted({i: (k, a) for i, k, a in results})
        if set(lengths) == {shape.nodes}:
            outlier = 10.0 if rng.random() < 0.01 else 1.0
            seen = seconds * np.exp(rng.normal() * noise) * outlier
            policy.observe_seconds(batch, shape, 0.0, seen, shape.nodes, shape.depth)
        lengths[:] = cut
    return run


def best_fixed(table: StepCostModel, batch: int, curve: list[float]) -> float:
    """Tokens a second of the best fixed K."""
    return max(
        batch * expected_tokens(curve, k) / table.step(batch * (k + 1), batch, k) for k in range(K_MAX + 1)
    )


def new_policy(table: StepCostModel) -> Policy:
    """Of an engine that starts without a cost file."""
    return Policy(SeenCost(table), chains(range(1, K_MAX + 1)))


def informed_policy(table: StepCostModel) -> Policy:
    """Of an engine that starts with a cost file which confirms the model everywhere."""
    policy = new_policy(table)
    policy.cost.from_json({f"{batch},{k}": 1.0 for batch in range(8) for k in range(K_MAX + 1)})
    return policy


@pytest.mark.parametrize("batch", [1, 4, 16, 56])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("table", TABLES)
def test_regret_of_the_first_200_steps(table: str, curve: str, batch: int) -> None:
    regrets = []
    for seed in range(8 if batch <= 4 else 2):
        run = simulate(
            informed_policy(TABLES[table]),
            TABLES[table],
            batch,
            CURVES[curve],
            200,
            np.random.default_rng(seed),
        )
        regrets.append(1 - run.tokens / run.seconds / best_fixed(TABLES[table], batch, CURVES[curve]))
    assert np.mean(regrets) <= 0.03, regrets


@pytest.mark.parametrize("batch", [1, 4, 56])
@pytest.mark.parametrize(
    "change", [("published", "zero"), ("zero", "published"), ("perfect", "low"), ("low", "perfect")]
)
@pytest.mark.parametrize("table", TABLES)
def test_regret_when_acceptance_jumps(table: str, change: tuple[str, str], batch: int) -> None:
    regrets = []
    for seed in range(6 if batch <= 4 else 2):
        policy, rng, lengths = informed_policy(TABLES[table]), np.random.default_rng(seed), [0] * batch
        halves = [simulate(policy, TABLES[table], batch, CURVES[c], 400, rng, lengths) for c in change]
        best = sum(
            h.seconds * best_fixed(TABLES[table], batch, CURVES[c])
            for h, c in zip(halves, change, strict=True)
        )
        regrets.append(1 - sum(h.tokens for h in halves) / best)
    assert np.mean(regrets) <= 0.05, regrets


@pytest.mark.parametrize("batch", [1, 4, 16, 56])
def test_a_wrong_model_is_corrected_by_what_is_seen(batch: int) -> None:
    true = TABLES["cpu"]
    wrong = StepCostModel({0: {1: 0.010, 256: 0.011}}, true.sync, true.draft)  # says that tokens are free
    policy, rng = new_policy(wrong), np.random.default_rng(0)
    lengths = [0] * batch
    simulate(policy, true, batch, CURVES["published"], 300, rng, lengths)
    later = simulate(policy, true, batch, CURVES["published"], 300, rng, lengths)
    assert later.tokens / later.seconds >= 0.95 * best_fixed(true, batch, CURVES["published"])


@pytest.mark.parametrize("batch", [1, 4, 16, 56])
def test_without_a_cost_file_it_measures_while_it_serves(batch: int) -> None:
    policy, rng, lengths = new_policy(StepCostModel.guess()), np.random.default_rng(0), [0] * batch
    simulate(policy, TABLES["cpu"], batch, CURVES["published"], 100, rng, lengths)
    later = simulate(policy, TABLES["cpu"], batch, CURVES["published"], 300, rng, lengths)
    assert later.tokens / later.seconds >= 0.96 * best_fixed(TABLES["cpu"], batch, CURVES["published"])


def test_chains_that_stop_early_are_worth_what_they_get() -> None:
    """Half of the drafts are sure to hold and the chain goes on, half rarely do and it stops after them."""
    table, rng = TABLES["cpu"], np.random.default_rng(0)
    policy, verified = new_policy(StepCostModel.guess()), 0
    accepted = 0

    def draft(most: int) -> tuple[int, int]:
        sure = int(min(rng.geometric(0.5) - 1, most))
        return min(sure + 1, most), sure + int(sure < most and rng.random() < 0.2)

    def seconds(verified: int, drafted: int) -> float:
        return table.step(verified + 1, 1, drafted) * float(np.exp(rng.normal() * 0.02))

    def fixed(most: int) -> float:
        lengths = [draft(most) if most else (0, 0) for _ in range(4000)]
        return sum(1 + a for _, a in lengths) / sum(seconds(n, n) for n, _ in lengths)

    scheduled, speed = 0, []
    for _ in range(800):
        shape = policy.choose(1)
        drafted, accepted_next = draft(shape.nodes) if shape.nodes else (0, 0)
        took = seconds(verified, drafted)
        speed.append((1 + accepted, took))
        if scheduled:
            policy.observe_accepted({"a": (scheduled, accepted)})  # what was not drafted was not accepted
        if scheduled == shape.nodes:
            policy.observe_lengths(shape, [drafted])
            policy.observe_seconds(1, shape, 0.0, took, verified, drafted)
        scheduled, verified, accepted = shape.nodes, drafted, accepted_next
    tokens, took = np.array(speed[200:]).sum(0)
    best = max(fixed(k) for k in range(K_MAX + 1))
    assert tokens / took >= 0.95 * best
    drafts, steps = policy.expected_drafts(Shape(5, 5), 1)
    assert drafts == steps == pytest.approx(sum(0.5**i for i in range(5)), rel=0.2)
    drafts_of_8, steps_of_8 = policy.expected_drafts(Shape(5, 5), 8)
    assert drafts_of_8 == pytest.approx(drafts, rel=0.05) and steps_of_8 > 1.5 * steps, "the longest decides"


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("batch", [1, 16, 56])
def test_zero_acceptance_leads_to_no_drafts_and_probes_cost_one_percent(table: str, batch: int) -> None:
    policy, rng, lengths = informed_policy(TABLES[table]), np.random.default_rng(1), [0] * batch
    simulate(policy, TABLES[table], batch, CURVES["zero"], 200, rng, lengths)
    run = simulate(policy, TABLES[table], batch, CURVES["zero"], 2000, rng, lengths)
    assert policy.current == NOTHING and policy.best(batch) == NOTHING
    plain = TABLES[table].step(batch, batch, 0)
    assert run.seconds <= 1.01 * 2000 * plain
    assert any(shape != NOTHING for shape in run.choices), "K = 0 must keep probing"


rates_ = st.lists(st.floats(0.0, 1.0), min_size=K_MAX, max_size=K_MAX)
seconds_ = st.floats(1e-4, 1.0)


@st.composite
def tables(draw: st.DrawFn) -> StepCostModel:
    """Any cost that grows with tokens and rows, convex or not."""

    def curve(sizes: list[int]) -> dict[int, float]:
        return dict(zip(sizes, np.cumsum([draw(seconds_) for _ in sizes]).tolist(), strict=True))

    return StepCostModel(
        {0: curve([1, 8, 64, 512])}, curve([1, 512]), curve([1, 64]), overhead=draw(seconds_)
    )


def with_rates(table: StepCostModel, rates: list[float]) -> Policy:
    policy = informed_policy(table)
    policy.acceptance[0].rates = lambda like=(): rates  # type: ignore[method-assign]
    return policy


@settings(max_examples=150, deadline=None)
@given(tables(), rates_, st.integers(1, 300), st.integers(0, 200))
def test_more_load_never_drafts_more(table: StepCostModel, rates: list[float], batch: int, more: int) -> None:
    policy = with_rates(table, rates)
    assert policy.best(batch + more).nodes <= policy.best(batch).nodes


@settings(max_examples=100, deadline=None)
@given(tables(), rates_)
def test_the_best_chain_of_one_request_is_the_fastest(table: StepCostModel, rates: list[float]) -> None:
    speeds = [expected_tokens(rates, k) / table.step(k + 1, 1, k) for k in range(K_MAX + 1)]
    best = with_rates(table, rates).best(1).nodes
    assert speeds[best] >= (1 - Policy.TIE) * max(speeds) * (1 - 1e-9)
    assert all(speed < speeds[best] for speed in speeds[:best])


@settings(max_examples=60, deadline=None)
@given(
    tables(),
    st.sets(st.integers(1, 9), max_size=4),
    st.integers(1, 64),
    st.lists(st.tuples(st.integers(0, 9), st.floats(1e-4, 10.0)), min_size=1, max_size=60),
    st.randoms(),
)
def test_never_outside_the_envelope(
    table: StepCostModel, lengths: set[int], batch: int, events: list[tuple[int, float]], random: object
) -> None:
    shapes = chains(lengths)
    policy = Policy(SeenCost(table), shapes)
    for accepted, seconds in events:
        shape = policy.choose(batch)
        assert shape in shapes
        cut = policy.lengths([str(i) for i in range(batch)], shape)
        assert len(cut) == batch and all(0 <= k <= shape.nodes for k in cut)
        policy.observe_accepted({str(i): (k, min(accepted, k)) for i, k in enumerate(cut)})
        policy.observe_seconds(batch, shape, 0.0, seconds, shape.nodes, shape.depth)
        assert all(0.0 <= r <= 1.0 for r in policy.acceptance[0].rates())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_allocate_is_the_best_of_all_budgets(requests: int, depth: int, data: st.DataObject) -> None:
    rates = np.array([[data.draw(st.floats(0, 1)) for _ in range(depth)] for _ in range(requests)])
    survivals = np.cumprod(rates, axis=1)
    seconds = np.cumsum([data.draw(seconds_) for _ in range(requests * depth + 1)])
    lengths = allocate(survivals, seconds)

    def speed(cut: np.ndarray) -> float:
        kept = sum(survivals[i, :k].sum() for i, k in enumerate(cut))
        return (requests + kept) / seconds[cut.sum()]

    every = [np.array(cut) for cut in np.ndindex(*[depth + 1] * requests)]
    assert speed(lengths) >= max(map(speed, every)) * (1 - 1e-9)


def test_the_budget_goes_to_the_requests_most_likely_to_accept() -> None:
    policy = new_policy(StepCostModel({0: {1: 0.01, 64: 0.05}}, {1: 0.0001}, {1: 0.0001}))
    for _ in range(30):
        policy.observe_accepted({"easy": (4, 4), "hard": (4, 0)})
    easy, hard = policy.lengths(["easy", "hard"], Shape(4, 4))
    assert easy == 4 and hard < easy
    policy.forget("easy")
    assert policy.lengths(["easy", "hard"], Shape(4, 4))[0] < 4 or "easy" not in policy.requests


def test_the_budget_knows_which_drafts_were_made() -> None:
    """Long chains are there because their drafts are good; the share of chains that go so far says so."""
    policy, shape = informed_policy(TABLES["cpu"]), Shape(5, 5)
    for _ in range(100):  # two of four stop after one draft that fails, two go on, and hold
        policy.observe_lengths(shape, [5, 5, 1, 1])
        policy.observe_accepted({"a": (5, 4), "b": (5, 5), "c": (5, 0), "d": (5, 0)})
    policy.requests.clear()
    assert policy.lengths(list("abcd"), shape, drafted=[5, 1, 5, 1]) == [5, 1, 5, 1]
    bad = informed_policy(TABLES["bad"])
    for _ in range(100):
        bad.observe_accepted({"a": (5, 1), "b": (5, 0)})
    assert sum(bad.lengths(["a", "b"], shape, drafted=[5, 3])) < 8, "but what does not hold is cut"


def test_acceptance_counts_only_the_requests_that_reached_a_depth() -> None:
    acceptance = Acceptance(3, window=1e9, min_steps=10**9)
    for _ in range(2000):
        acceptance.observe([3, 3, 3, 3], [0, 1, 3, 3])
    assert acceptance.rates() == pytest.approx([3 / 4, 2 / 3, 1.0], abs=1e-2)


def test_a_tree_wins_when_its_width_pays() -> None:
    tree = Shape(nodes=12, depth=3, width=4)
    policy = Policy(SeenCost(TABLES["gpu"]), (*chains([1, 2, 3]), tree))
    assert set(policy.acceptance) == {0, tree.family}
    for _ in range(200):
        policy.observe_accepted({"a": (3, 1), "b": (12, 3)})
    assert policy.best(1) == tree
    assert policy.best(256).nodes < tree.nodes


def test_shapes_must_hold_nothing_and_differ_in_nodes() -> None:
    with pytest.raises(ValueError, match="differ in their number of nodes"):
        Policy(SeenCost(TABLES["cpu"]), [NOTHING, Shape(3, 3), Shape(3, 2, 2)])
    with pytest.raises(ValueError, match="shapes must hold"):
        Policy(SeenCost(TABLES["cpu"]), [Shape(3, 3)])


def test_requests_that_sample_have_rates_of_their_own():
    """Greedy requests accept everything and sampled ones nothing: each kind is drafted for as it deserves."""
    policy = informed_policy(TABLES["cpu"])
    policy.sampling = {"sampled"}
    for _ in range(60):
        policy.observe_accepted({"greedy": (5, 5), "sampled": (5, 0)})
    shape = Shape(5, 5)
    greedy, sampled = policy.lengths(["greedy", "sampled"], shape)
    assert greedy == 5 and sampled < 5
    gains = []
    for share in (0.0, 0.5, 1.0):
        policy.expect(share)
        gains.append(policy.gain(shape))
    assert gains[0] > 5 and gains[2] < 1.2 and gains[1] == pytest.approx((gains[0] + gains[2]) / 2)
    policy.forget("sampled")
    assert not policy.sampling


def test_drawn_drafts_are_verified_whatever_was_drawn():
    """Where a chain ends depends on the tokens drawn, so the budget must not decide by it."""
    policy = informed_policy(TABLES["cpu"])
    policy.sampling, policy.draws = {"a", "b"}, True
    for _ in range(60):
        policy.observe_accepted({"greedy": (5, 0), "a": (5, 0), "b": (5, 0)})
    shape = Shape(5, 5)
    for drafted in ([5, 1, 5], [5, 5, 5], [1, 2, 3]):
        greedy, *drawn = policy.lengths(["greedy", "a", "b"], shape, 0.0, drafted)
        assert drawn == drafted[1:] and greedy < drafted[0] + (drafted[0] == 1)
    policy.draws = False
    assert policy.lengths(["greedy", "a", "b"], shape, 0.0, [5, 5, 5]) != [5, 5, 5]
