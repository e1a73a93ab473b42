"""The dummy steps that a GPU's start-up times, on a runner that only notes them. A few seconds."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from vllm_eagle3.policy.cost import StepCostModel


class Runner:
    """Of a GPU: 256 requests at most, drafts take 1 ms and 1 microsecond a token."""

    max_num_tokens = 512

    def __init__(self, options):
        scheduler = SimpleNamespace(scheduler_cls="vllm_eagle3.runner.policy_scheduler.build_scheduler")
        self.vllm_config = SimpleNamespace(
            scheduler_config=scheduler,
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
            speculative_config=SimpleNamespace(num_speculative_tokens=5),
            additional_config={"eagle3": options},
        )
        self.steps, self.step_timing = [], self

    @contextmanager
    def collect(self):
        samples = []
        yield samples
        for index, tokens in enumerate(self.steps):
            slow = 50 if index % 4 == 0 else 1  # a compilation
            samples.append(
                SimpleNamespace(
                    forward_ms=slow * (6 + tokens / 100), drafter_ms=slow * (1 + tokens / 1000),
                    num_target_tokens=tokens, num_reqs=min(tokens, 256),
                )
            )  # fmt: skip

    def _dummy_run(self, tokens):
        self.steps.append(tokens)


@pytest.mark.parametrize(("options", "rows"), [({}, 1), ({"tree": {"depth": 4, "topk": 3, "nodes": 5}}, 3)])
@pytest.mark.parametrize("first_rank", [True, False])
def test_the_scheduler_finds_what_the_worker_timed(monkeypatch, tmp_path, options, rows, first_rank):
    from vllm_eagle3.policy.cost_file import CostFile, CostKey
    from vllm_eagle3.runner.v2 import step_costs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = CostKey("target", "draft", "gpu", "test")
    monkeypatch.setattr(step_costs, "cost_key", lambda config: key)
    monkeypatch.setattr(step_costs, "get_world_group", lambda: SimpleNamespace(is_first_rank=first_rank))
    monkeypatch.setattr(step_costs, "_stock", lambda self, profile_only: 7)
    runner = Runner(options)
    assert step_costs.capture_model(runner, profile_only=True) == 7
    assert not runner.steps, "a capture that measures memory is thrown away"
    assert step_costs.capture_model(runner) == 7
    assert sorted(set(runner.steps)) == [1, 8, 32, 64, 128, 256, 512], (
        "on every rank, as they wait for each other"
    )
    model = CostFile(key).load().model
    if not first_rank:
        assert model == StepCostModel.guess()
        return
    assert model.target[0][64] == pytest.approx(6.64e-3)
    assert model.draft[64 * rows] == pytest.approx(1.064e-3 / (4 if options else 5))


def test_nothing_is_timed_without_the_policy(monkeypatch):
    from vllm_eagle3.runner.v2 import step_costs

    monkeypatch.setattr(step_costs, "_stock", lambda self, profile_only: 7)
    runner = Runner({})
    runner.vllm_config.scheduler_config.scheduler_cls = None
    assert step_costs.capture_model(runner) == 7
    assert not runner.steps
