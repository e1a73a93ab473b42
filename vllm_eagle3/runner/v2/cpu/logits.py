"""CPU form of the kernel of vllm.v1.worker.gpu.metrics.logits."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.metrics.logits"


def _num_nans_kernel(
    logits_ptr: torch.Tensor, logits_stride: int, num_nans_ptr: torch.Tensor, vocab_size: int, BLOCK_SIZE: int
) -> None:
    """Write how many logits of each row are NaN."""
    num_nans_ptr.copy_(logits_ptr[:, :vocab_size].isnan().sum(dim=-1))
