"""A step cost model from timed steps, and in the cost file. Under a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_eagle3.policy.cost import StepCostModel
from vllm_eagle3.policy.cost_file import CostFile, CostKey
from vllm_eagle3.policy.cost_table import TimedStep, cost_table, from_json, to_json

KEY = CostKey("target", "draft", "NVIDIA H100", "test")
TRUE = StepCostModel(
    {0: {1: 6e-3, 64: 6.4e-3, 256: 7e-3, 1024: 20e-3}},
    sync={1: 3e-4, 64: 3e-4, 256: 4e-4, 1024: 1e-3},
    draft={1: 3e-4, 64: 3e-4, 256: 4e-4},
)


def timed(model: StepCostModel, depth: int, slower: float = 1.0) -> list[TimedStep]:
    """Three steps of each size; one of them is disturbed."""
    sizes = [(1, 1), (64, 64), (256, 256), (1024, 256)]
    return [
        TimedStep(
            tokens,
            requests,
            slower * noise * model.target_step(tokens, 0),
            slower * noise * (model.step(tokens, requests, depth) - model.target_step(tokens, 0)),
        )
        for tokens, requests in sizes
        for noise in (1.0, 9.0, 1.0)
    ]


def test_curves_are_those_of_the_machine() -> None:
    found = cost_table(timed(TRUE, 4), depth=4)
    for tokens, rows, depth in ((1, 1, 0), (64, 64, 4), (256, 64, 4), (640, 128, 2), (1024, 256, 1)):
        assert found.step(tokens, rows, depth) == pytest.approx(TRUE.step(tokens, rows, depth), rel=0.03)


def test_a_tree_has_several_rows_a_request() -> None:
    steps = [TimedStep(1, 1, 6e-3, 6 * 3e-4), TimedStep(8, 8, 6e-3, 6 * 4e-4)]
    found = cost_table(steps, depth=6, width=10)
    assert found.draft == pytest.approx({10: 3e-4, 80: 4e-4})
    assert found.sync == pytest.approx({1: 3e-4, 8: 4e-4})


def test_a_larger_step_is_never_a_shorter_one() -> None:
    steps = [TimedStep(1, 1, 6e-3, 3e-4), TimedStep(8, 8, 5e-3, 2e-4), TimedStep(16, 8, 4e-3, 1e-4)]
    found = cost_table(steps, depth=1)
    assert found.target == {0: {1: 6e-3, 8: 6e-3, 16: 6e-3}}
    assert found.sync == {1: 3e-4, 8: 3e-4, 16: 3e-4}
    with pytest.raises(ValueError, match="one token a request"):
        cost_table([TimedStep(16, 8, 4e-3, 1e-4)], depth=1)


def test_json() -> None:
    assert from_json(json.loads(json.dumps(to_json(TRUE)))) == TRUE
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_json({"target": {"0": {"1": -1.0}}, "sync": {"1": 1}, "draft": {"1": 1}, "overhead": 0})


def test_what_was_seen_stays_while_the_machine_is_the_same(tmp_path: Path) -> None:
    def start(slower: float) -> None:
        CostFile(KEY, tmp_path).keep_model(cost_table(timed(TRUE, 4, slower), depth=4))

    start(1.0)
    file = CostFile(KEY, tmp_path)
    cost = file.load()
    first = cost.model
    assert first != StepCostModel.guess() and not cost.to_json()
    for _ in range(3):
        cost.observe(4, 3, 1.0, 1.5)
    file.save(cost)
    start(1.1)  # as noise of the next start
    again = CostFile(KEY, tmp_path).load()
    assert again.model == first and again.correction(4, 3) == pytest.approx(1.5)
    start(1.5)  # another driver, or no CUDA graphs any more
    anew = CostFile(KEY, tmp_path).load()
    assert anew.model.target[0][1] == pytest.approx(1.5 * first.target[0][1]) and not anew.to_json()


def test_a_model_replaces_what_was_seen_with_the_guess(tmp_path: Path) -> None:
    file = CostFile(KEY, tmp_path)
    cost = file.load()
    for _ in range(3):
        cost.observe(4, 3, 1.0, 1.5)
    file.save(cost)
    file.keep_model(TRUE)
    assert CostFile(KEY, tmp_path).load().model == TRUE
    assert not CostFile(KEY, tmp_path).load().to_json()


def test_a_damaged_model_is_learned_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CostFile(KEY, tmp_path).keep_model(TRUE)
    path = KEY.path(tmp_path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"model": {"target": 3}}))
    assert CostFile(KEY, tmp_path).load().model == StepCostModel.guess()
    assert str(path) in caplog.text
