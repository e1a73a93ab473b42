"""The int8 draft on a CPU: its product equals the dequantised one, and layers that stay unchanged (30 s)."""

import pytest
import torch
from engines import speculative, token_ids
from vllm import SamplingParams

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.model.int8 import MAX_ERROR, Int8Linear


@pytest.mark.parametrize("rows", [1, 2, 5, 33, 128])
def test_product_is_that_of_the_rounded_matrices(rows):
    torch.manual_seed(rows)
    weight, x = torch.randn(160, 96).bfloat16(), 3 * torch.randn(rows, 2 * 96).bfloat16()[:, :96]  # strided
    x[rows // 2 : rows // 2 * 2] = 0
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    x_scale = x.double().abs().amax(1, keepdim=True).clamp_min(1e-10) / 127
    want = ((x / x_scale).round() * x_scale) @ ((weight / scale).round() * scale).T
    got = Int8Linear(weight)(x)
    assert got.dtype == torch.bfloat16
    assert float((got - want).norm() / want.norm()) < 0.01


def test_matrices_that_round_badly_are_left_alone():
    even = torch.randn(64, 1024).bfloat16()
    uneven = even.clone()
    uneven[:, 0] *= 50  # each row's scale has to reach its largest weight
    assert Int8Linear(even).error < 0.02 < MAX_ERROR < Int8Linear(uneven).error


def metric(llm, name):
    return next(m.value for m in llm.get_metrics() if m.name == f"vllm:spec_decode_num_{name}")


def test_drafts_as_well_as_in_bf16(engine):
    target, draft = default_pair()
    prompts = [[1, 4093, 198, *range(700 + 40 * i, 720 + 40 * i), 2, 198] for i in range(8)]
    taus, packed = {}, {}
    for int8 in (True, False):
        llm = engine(
            target,
            dtype="bfloat16",
            speculative_config=speculative(draft, 3),
            additional_config={"eagle3": {"int8_draft": int8}},
        )
        token_ids(llm, prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
        taus[int8] = 1 + metric(llm, "accepted_tokens") / metric(llm, "drafts")
        core = llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.drafter.model
        packed[int8] = len(model.int8)
        torch.manual_seed(0)
        states = model.model.norm.weight * torch.randn(5, 576).bfloat16()
        ids, confidence = model.get_confident_tokens(states)
        want = model.draft_logits(states).float().softmax(dim=-1).max(dim=-1)
        assert torch.equal(ids, model.draft_to_target[want.indices])
        torch.testing.assert_close(confidence, want.values, rtol=0.02, atol=0)
    assert packed == {True: 5, False: 0}, "the shipped draft's fc would lose too much"
    assert taus[True] > 0.95 * taus[False] > 1.1
