"""The step cost model: interpolation, and the correction by observed steps (under a second)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_eagle3.policy.cost import SeenCost, StepCostModel, bucket, interpolate

MODEL = StepCostModel(
    {128: {1: 0.02, 16: 0.03}, 1024: {1: 0.03, 16: 0.05}}, {1: 0.001, 16: 0.002}, {1: 0.001}, 0.004
)


def test_interpolation_passes_through_the_points_and_goes_on_outside() -> None:
    curve = {2: 1.0, 4: 2.0, 10: 2.0}
    assert [interpolate(curve, x) for x in (2, 3, 4, 7, 10, 100)] == [1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert interpolate(curve, 1) == 0.5
    assert interpolate({8: 3.0}, 1000) == 3.0
    with pytest.raises(ValueError, match="at least one point"):
        interpolate({}, 1)


@given(st.dictionaries(st.integers(1, 100), st.floats(0, 1), min_size=1), st.integers(1, 200))
def test_interpolation_is_never_negative(curve: dict[int, float], size: int) -> None:
    assert interpolate(curve, size) >= 0.0


def test_a_step_adds_up() -> None:
    assert MODEL.step(16, 4, 0, 128) == pytest.approx(0.004 + 0.03 + 0.002)
    assert MODEL.step(16, 4, 1, 128) == MODEL.step(16, 4, 0, 128), "the sync pass gives the first draft"
    assert MODEL.step(16, 4, 3, 128) == pytest.approx(0.004 + 0.03 + 0.002 + 2 * 0.001)
    assert MODEL.target_step(16, (128 + 1024) / 2) == pytest.approx(0.04)
    assert MODEL.target_step(16, 0) == pytest.approx(0.03), "below the first bucket: the first bucket"


@pytest.mark.parametrize(
    "bad",
    [
        {"target": {}},
        {"sync": {}},
        {"draft": {0: 1.0}},
        {"target": {0: {1: -1.0}}},
        {"sync": {1: float("nan")}},
    ],
)
def test_bad_models_are_refused(bad: dict) -> None:
    good = {"target": {0: {1: 1.0}}, "sync": {1: 0.1}, "draft": {1: 0.1}}
    StepCostModel(**good)
    with pytest.raises(ValueError, match="step cost model"):
        StepCostModel(**{**good, **bad})


def test_corrections_are_medians_and_ignore_outliers() -> None:
    cost = SeenCost(MODEL)
    plain = cost.base(16, 4, 3, 0.0)
    for ratio in (1.5, 1.5, 40.0, 1.5, 1.5, 0.01):
        cost.observe(4, 3, plain, ratio * plain)
    assert cost.correction(4, 3) == pytest.approx(1.5)
    assert cost.known(3, 3) and not cost.known(4, 2), "batches 3 and 4 share a bucket"
    assert cost.correction(4, 0) == pytest.approx(1.5), "a cell never seen follows its neighbour"
    with pytest.raises(ValueError, match="more than 0 seconds"):
        cost.observe(4, 3, plain, 0.0)


def test_old_corrections_are_forgotten_and_new_ones_follow_the_machine() -> None:
    cost = SeenCost(MODEL, max_age=50)
    for _ in range(20):
        cost.observe(1, 1, 1.0, 2.0)
    for _ in range(60):
        cost.observe(1, 2, 1.0, 3.0)
    assert not cost.known(1, 1) and cost.correction(1, 2) == pytest.approx(3.0)
    for _ in range(50):
        cost.observe(1, 2, 1.0, 1.0)
    assert cost.correction(1, 2) == pytest.approx(1.0, rel=0.02)


def test_a_machine_that_slows_down_does_not_change_the_order_of_shapes() -> None:
    cost = SeenCost(MODEL)
    for drafts, ratio in ((0, 1.0), (2, 1.2)):
        for _ in range(40):
            cost.observe(4, drafts, 1.0, ratio)
    for _ in range(60):
        cost.observe(4, 2, 1.0, 2 * 1.2)
    assert cost.correction(4, 2) == pytest.approx(2.4, rel=0.02)
    assert cost.correction(4, 0) / cost.correction(4, 2) == pytest.approx(1.0 / 1.2, rel=0.05)


def test_saved_corrections_come_back() -> None:
    cost = SeenCost(MODEL)
    for _ in range(3):
        cost.observe(4, 3, 1.0, 1.5)
    again = SeenCost(MODEL)
    again.from_json(json.loads(json.dumps(cost.to_json())))
    assert again.known(4, 3) and again.correction(4, 3) == pytest.approx(1.5)


def test_buckets() -> None:
    assert [bucket(b) for b in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [0, 1, 2, 2, 3, 3, 4, 4, 5]
