"""Mends a defect of vLLM on a CPU: drafts of -1, which mean "no draft", are sampled as if they were tokens."""

from typing import Any

import torch
from vllm.utils import cpu_triton_utils

_stock = cpu_triton_utils._rejection_random_sample_kernel_impl


def rejection_random_sample(
    output_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    recovered_token_ids: torch.Tensor,
    uniform_probs: torch.Tensor,
    *rest: Any,
    **options: Any,
) -> None:
    """Replaces `_rejection_random_sample_kernel_impl`: a draft of -1 is rejected, as vLLM's Triton kernel does.

    Upstream's C++ kernel reads the probability of token -1 from the row before, and may emit -1. Here such a draft
    becomes token 0 with a random number above every probability, so that it is rejected.
    """
    none = draft_token_ids < 0
    if none.any():
        draft_token_ids = draft_token_ids.masked_fill(none, 0)
        uniform_probs = uniform_probs.masked_fill(none, torch.inf)
    _stock(
        output_token_ids,
        cu_num_draft_tokens,
        draft_token_ids,
        draft_probs,
        target_probs,
        bonus_token_ids,
        recovered_token_ids,
        uniform_probs,
        *rest,
        **options,
    )
