"""The policy's scheduler on a simulated H100 that reads prompts while it decodes (40 s). No engine and no GPU.

Times are those of an 8B model in bf16, as estimated in docs/gpu.md: a step is bound by reading weights up to about 300
tokens, and a prompt of 1,500 tokens takes four times as long as a step that only decodes. As on a GPU, the time between
two results is what the former step drafted and the latter verified.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_eagle3.policy.cost import SeenCost, StepCostModel, interpolate
from vllm_eagle3.policy.cost_file import CostFile, CostKey
from vllm_eagle3.policy.cost_table import TimedStep, cost_table
from vllm_eagle3.policy.policy import Policy
from vllm_eagle3.policy.shape import chains
from vllm_eagle3.runner import draft_scheduler, policy_scheduler

VERIFY = {
    1: 6.2e-3,
    64: 6.4e-3,
    128: 6.6e-3,
    256: 7.0e-3,
    320: 7.4e-3,
    512: 10.5e-3,
    1024: 19.5e-3,
    4096: 76e-3,
}
DRAFT_PASS = {1: 0.28e-3, 256: 0.33e-3, 512: 0.5e-3, 4096: 3.4e-3}
DRAFT_STEP = {1: 0.28e-3, 256: 0.33e-3}
RATES = [0.75, 0.7, 0.68, 0.66, 0.65, 0.64, 0.63]
PROMPT, CONTEXT = 1500, 1000


def table_of_the_start() -> StepCostModel:
    """What timed dummy runs on this machine give."""
    sizes = [(n, min(n, 256)) for n in (1, 8, 64, 128, 256, 512, 1024)]
    steps = [
        TimedStep(
            n, requests, interpolate(VERIFY, n),
            interpolate(DRAFT_PASS, n) + 4 * interpolate(DRAFT_STEP, requests),
        )
        for n, requests in sizes
    ]  # fmt: skip
    return cost_table(steps, depth=5)


class Machine:
    """Serves `batch` requests of `length` tokens each; who is done makes room for another, whose prompt is read."""

    def __init__(self, batch: int, length: float, seed: int = 0) -> None:
        self.batch, self.length, self.rng = batch, length, np.random.default_rng(seed)
        self.clock = self.seconds = 0.0  # with noise and without
        self.tokens = 0
        self.drafts = dict.fromkeys(map(str, range(batch)), 0)  # that each request verifies next
        self.left = {r: length * self.rng.random() for r in self.drafts}
        self.drafting = 0.0  # seconds of the drafting that the step before began
        self.prompts = 0  # to read in the next step
        self.next = batch

    def step(self, drafts: int) -> tuple[SimpleNamespace, SimpleNamespace]:
        """One step that drafts so many a request: vLLM's view of it."""
        new = [SimpleNamespace(req_id=str(self.next + i)) for i in range(self.prompts)]
        self.next += len(new)
        sampled = {}
        for request, verified in self.drafts.items():
            accepted = int(np.cumprod(self.rng.random(verified) < RATES[:verified]).sum())
            sampled[request] = [7] * (accepted + 1)
            self.left[request] -= accepted + 1
            self.tokens += accepted + 1
        scheduled = {r: [-1] * k for r, k in self.drafts.items() if k}
        tokens = {r: k + 1 for r, k in self.drafts.items()} | {r.req_id: PROMPT for r in new}
        rows, requests = sum(tokens.values()), len(tokens)
        seconds = self.drafting + interpolate(VERIFY, rows)
        self.seconds += seconds
        self.clock += (
            seconds * float(np.exp(0.02 * self.rng.normal())) * (5.0 if self.rng.random() < 0.01 else 1)
        )
        steps = max(drafts - 1, 0)
        self.drafting = interpolate(DRAFT_PASS, rows) + steps * interpolate(DRAFT_STEP, requests)
        sampled |= {r.req_id: [7] for r in new}
        self.left |= {r.req_id: self.length for r in new}
        done = {r for r, left in self.left.items() if left <= 0}
        self.left = {r: left for r, left in self.left.items() if r not in done}
        self.drafts, self.prompts = dict.fromkeys(self.left, drafts), len(done)
        step = SimpleNamespace(
            num_invalid_spec_tokens=None, scheduled_spec_decode_tokens=scheduled, finished_req_ids=done,
            num_spec_tokens_to_schedule=drafts, num_scheduled_tokens=tokens, scheduled_new_reqs=new,
        )  # fmt: skip
        ids = list(sampled)
        output = SimpleNamespace(
            req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=[sampled[r] for r in ids]
        )
        return step, output


def scheduler(policy: Policy, batch: int) -> policy_scheduler.AsyncPolicyScheduler:
    """The scheduler without an engine."""
    sched = object.__new__(policy_scheduler.AsyncPolicyScheduler)
    sched.draft_policy, sched._cost_file = policy, CostFile(CostKey("t", "d", "cuda", "test"))
    sched._cost_file.path = None
    sched.scheduler_config = SimpleNamespace(async_scheduling=True)  # type: ignore[assignment]
    sched._start_counting()
    sched._drafted, sched._cut_trees, sched._unlearned, sched._last_step = {}, set(), None, 0.0
    sched._decoded_only = sched._hurried = policy.follows_requests = False
    decoding = SimpleNamespace(request_id="r", num_computed_tokens=CONTEXT, num_prompt_tokens=9)
    sched.running = [decoding] * batch  # type: ignore[list-item]
    return sched


def serve(machine: Machine, sched: policy_scheduler.AsyncPolicyScheduler, steps: int) -> list[int]:
    """The numbers of drafts that the policy chose. Each step is scheduled before the one before it ends."""
    chosen, before = [], None
    decoding, reading = (
        sched.running[:1],
        [SimpleNamespace(request_id="p", num_computed_tokens=0, num_prompt_tokens=PROMPT)],
    )
    for _ in range(steps):
        sched.running = decoding * len(machine.drafts) + reading * machine.prompts  # type: ignore[operator]
        chosen.append(sched.choose(len(sched.running)))
        if before is not None:
            sched.update_from_output(*before)
        before = machine.step(chosen[-1])
    return chosen


def speed_of_fixed(drafts: int, batch: int, length: float, steps: int) -> float:
    machine = Machine(batch, length, seed=1)
    for _ in range(steps):
        machine.step(drafts)
    return machine.tokens / machine.seconds


@pytest.mark.parametrize("length", [float("inf"), 1500, 150])
@pytest.mark.parametrize("batch", [16, 32, 64])
@pytest.mark.parametrize("most", [5, 7])
def test_prompts_do_not_mislead_the_policy(monkeypatch, most, batch, length):
    """With answers of 150 tokens and 64 requests, about every step reads a prompt."""
    monkeypatch.setattr(policy_scheduler.AsyncScheduler, "update_from_output", lambda *_: {})
    sizes = {5: [0, 1, 2, 5], 7: [0, 1, 3, 7]}[most]
    machine = Machine(batch, length)
    clock = SimpleNamespace(perf_counter=lambda: machine.clock)
    for module in (policy_scheduler, draft_scheduler):
        monkeypatch.setattr(module, "time", clock)
    sched = scheduler(Policy(SeenCost(table_of_the_start()), chains(sizes)), batch)
    serve(machine, sched, 200)
    machine.tokens, machine.seconds = 0, 0.0
    chosen = serve(machine, sched, 250)
    fixed = {k: speed_of_fixed(k, batch, length, 250) for k in sizes}
    best = max(fixed, key=fixed.__getitem__)
    usual = max(set(chosen), key=chosen.count)
    assert abs(sizes.index(usual) - sizes.index(best)) <= 1, (usual, fixed)
    assert machine.tokens / machine.seconds >= 0.93 * fixed[best], (fixed, usual)
    assert all(0.93 <= ratio <= 1.12 for ratio in sched.draft_policy.cost.to_json().values())
