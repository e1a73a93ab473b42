"""What this project repairs in vLLM's sampling on a CPU, function by function. Seconds."""

import pytest
import torch
from vllm.platforms import current_platform
from vllm.utils import cpu_triton_utils
from vllm.v1.sample.ops import topk_topp_sampler

from vllm_eagle3.runner import ledger
from vllm_eagle3.runner.hooks import cpu_top_k

ledger.install()
current_platform.import_kernels()


def test_top_k_of_no_rows():
    """Upstream takes the maximum over none of them."""
    none, k = torch.empty(0, 8), torch.empty(0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="max"):
        cpu_top_k._stock(none, k.clone())
    assert topk_topp_sampler.apply_top_k_top_p(none, k, None).shape == (0, 8)


def test_top_k_of_some_rows():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    found = topk_topp_sampler.apply_top_k_top_p(logits, torch.tensor([1, 3], dtype=torch.int32), None)
    assert found.tolist() == [[-torch.inf, 3.0, -torch.inf], [1.0, 3.0, 2.0]]


@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_a_draft_of_minus_one_is_rejected(with_draft_probs):
    """Two requests: drafts [1, -1, 1] and [-1]. The target is sure of token 1, so every real draft is accepted."""
    vocab = 4
    drafts = torch.tensor([1, -1, 1, -1], dtype=torch.int32)
    target = torch.zeros(4, vocab)
    target[:, 1] = 1.0
    draft_probs = torch.full((4, vocab), 0.25) if with_draft_probs else None
    output = torch.full((2, 4), -1, dtype=torch.int32)
    cpu_triton_utils._rejection_random_sample_kernel_impl(
        output,
        torch.tensor([3, 4], dtype=torch.int32),
        drafts,
        draft_probs,
        target,
        torch.tensor([[2], [2]], dtype=torch.int32),
        torch.full((4,), 3, dtype=torch.int32),
        torch.zeros(4, dtype=torch.float64),
        torch.tensor([False, False]),
        3,
        vocab,
        NO_DRAFT_PROBS=draft_probs is None,
    )
    assert output.tolist() == [[1, 3, -1, -1], [3, -1, -1, -1]]
    assert drafts.tolist() == [1, -1, 1, -1], "the drafts themselves are left as they are"
