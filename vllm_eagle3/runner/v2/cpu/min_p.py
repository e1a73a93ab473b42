"""CPU form of the kernel of vllm.v1.worker.gpu.sample.min_p."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.sample.min_p"


def _min_p_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    min_p_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Mask the tokens whose probability is below min_p times that of the likeliest token."""
    min_p = min_p_ptr[expanded_idx_mapping_ptr].float()
    for row in min_p.nonzero().flatten().tolist():
        logits = logits_ptr[row, :vocab_size]
        logits.masked_fill_(logits < logits.amax().float() + min_p[row].log(), float("-inf"))
