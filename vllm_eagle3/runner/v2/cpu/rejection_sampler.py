"""CPU forms of the kernels of vllm.v1.worker.gpu.spec_decode.rejection_sampler."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"


def _flatten_sampled_kernel(
    flat_sampled_ptr: torch.Tensor,
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    num_sampled_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    num_warps: int = 1,
) -> None:
    """Write each request's sampled tokens to the places of its rows of logits."""
    firsts = cu_num_logits_ptr.tolist()
    for i, count in enumerate(num_sampled_ptr.tolist()):
        flat_sampled_ptr[firsts[i] : firsts[i] + count] = sampled_ptr[i, :count]


def _gather_draft_sampled_kernel(
    draft_sampled_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    num_logits: int,
    BLOCK_SIZE: int,
) -> None:
    """Write the token and the position of each row that has logits; -1 for drafts within the prompt."""
    positions = torch.index_select(positions_ptr, 0, logits_indices_ptr, out=pos_ptr)
    tokens = torch.index_select(input_ids_ptr, 0, logits_indices_ptr, out=draft_sampled_ptr)
    local = expanded_local_pos_ptr
    placeholder = (local > 0) & (positions - local < prefill_len_ptr[expanded_idx_mapping_ptr])
    tokens.masked_fill_(placeholder, -1)
