"""CPU form of the kernel of vllm.v1.worker.gpu.structured_outputs."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.structured_outputs"


def _apply_grammar_bitmask_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    logits_indices_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    bitmask_ptr: torch.Tensor,
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    """Mask the tokens that each row's grammar forbids, one bit per token. Rows that were cut off have no bits."""
    bits, firsts = torch.arange(32, dtype=torch.int32), cu_num_logits_ptr.tolist()
    for mask, place in zip(bitmask_ptr, logits_indices_ptr.tolist(), strict=True):
        request, position = divmod(place, MASK_STRIDE)
        row = firsts[request] + position
        if row < firsts[request + 1]:
            forbidden = (mask[:, None] >> bits & 1).flatten()[:vocab_size] == 0
            logits_ptr[row, : len(forbidden)].masked_fill_(forbidden, float("-inf"))
