"""CPU forms of the kernels of vllm.v1.worker.gpu.sample.penalties."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.sample.penalties"


def _penalties_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    token_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    repetition_penalty_ptr: torch.Tensor,
    frequency_penalty_ptr: torch.Tensor,
    presence_penalty_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Apply repetition, frequency and presence penalties. The drafts before a row count as output."""
    bits = torch.arange(32, dtype=torch.int32)
    places = expanded_local_pos_ptr.tolist()
    for row, request in enumerate(expanded_idx_mapping_ptr.tolist()):
        repetition, frequency = repetition_penalty_ptr[request], frequency_penalty_ptr[request]
        presence = presence_penalty_ptr[request]
        if repetition == 1 and frequency == 0 and presence == 0:
            continue
        counts = output_bin_counts_ptr[request, :vocab_size].clone()
        drafts = token_ids_ptr[row - places[row] + 1 : row + 1].long()
        counts.index_add_(0, drafts, torch.ones_like(drafts, dtype=counts.dtype))
        seen, logits = counts > 0, logits_ptr[row, :vocab_size].float()
        if repetition != 1:
            in_prompt = (prompt_bin_mask_ptr[request, :, None] >> bits & 1).flatten()[:vocab_size].bool()
            scale = torch.where(in_prompt | seen, repetition, 1.0)
            logits = logits * torch.where(logits > 0, 1.0 / scale, scale)
        logits_ptr[row, :vocab_size] = logits - frequency * counts - presence * seen.float()


def _bincount_kernel(
    expanded_idx_mapping_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """Mark the tokens of each request's prompt, one bit per token, and count the tokens of its output."""
    bits = torch.ones((), dtype=torch.int32) << torch.arange(32, dtype=torch.int32)
    for request in expanded_idx_mapping_ptr.tolist():
        prompt_len, prefill_len = int(prompt_len_ptr[request]), int(prefill_len_ptr[request])
        prompt, output = all_token_ids_ptr[request, :prefill_len].long().tensor_split([prompt_len])
        words = prompt_bin_mask_ptr[request]
        present = torch.zeros(len(words) * 32, dtype=torch.bool)
        present[prompt] = True
        words |= (present.view(-1, 32) * bits).sum(dim=-1, dtype=torch.int32)
        counts = output_bin_counts_ptr[request]
        counts.index_add_(0, output, torch.ones_like(output, dtype=counts.dtype))
