"""Corrects one of vLLM's CPU kernels, which speculation with sampling uses."""

from typing import Any

import torch


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: Any = None,
) -> None:
    """Repeat each request's value for each of its tokens, in place.

    Args:
        output: [num_tokens] any dtype; written.
        input_val: [batch] one value per request.
        cu_num_tokens: [batch] cumulative numbers of tokens.
        replace_from: the value that is replaced.
        replace_to: the value that replaces it.
        MAX_NUM_TOKENS: not used; it is in upstream's signature.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
    output[: int(counts.sum())] = values.repeat_interleave(counts).to(output.dtype)
