"""CPU forms of the kernels of vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator."""

import torch

from vllm_eagle3.kernels._numba import jit

UPSTREAM = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"


def _prepare_prefill_inputs_kernel(
    last_token_indices_ptr: torch.Tensor,
    draft_current_step_ptr: torch.Tensor,
    draft_input_ids_ptr: torch.Tensor,
    draft_positions_ptr: torch.Tensor,
    draft_query_start_loc_ptr: torch.Tensor,
    draft_seq_lens_ptr: torch.Tensor,
    target_input_ids_ptr: torch.Tensor,
    target_positions_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    last_sampled_ptr: torch.Tensor,
    next_prefill_tokens_ptr: torch.Tensor,
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Write the inputs of the first draft step: the target's tokens up to the last accepted one, shifted by one row."""
    draft_current_step_ptr.zero_()
    _prefill(
        last_token_indices_ptr.numpy(),
        draft_input_ids_ptr.numpy(),
        draft_positions_ptr.numpy(),
        draft_query_start_loc_ptr.numpy(),
        draft_seq_lens_ptr.numpy(),
        target_input_ids_ptr.numpy(),
        target_positions_ptr.numpy(),
        idx_mapping_ptr.numpy(),
        last_sampled_ptr.view(-1).numpy(),
        next_prefill_tokens_ptr.view(-1).numpy(),
        num_sampled_ptr.numpy(),
        num_rejected_ptr.numpy(),
        query_start_loc_ptr.numpy(),
        seq_lens_ptr.numpy(),
    )


@jit
def _prefill(
    last_rows, ids, positions, starts, seq_lens, target_ids, target_positions, requests, last, following,
    num_sampled, num_rejected, target_starts, target_seq_lens,
):  # fmt: skip
    batch = requests.shape[0]
    for i in range(batch):
        first, end = target_starts[i], target_starts[i + 1] - num_rejected[i]
        for row in range(first, end - 1):
            ids[row] = target_ids[row + 1]
        ids[end - 1] = last[requests[i]] if num_sampled[i] > 0 else following[requests[i]]
        for row in range(first, end):
            positions[row] = target_positions[row]
        last_rows[i], starts[i], seq_lens[i] = end - 1, first, target_seq_lens[i]
    last_rows[batch:] = 0
    starts[batch:] = target_starts[batch]
    seq_lens[batch:] = 0


def _prepare_decode_inputs_kernel(
    draft_tokens_ptr: torch.Tensor,
    draft_tokens_stride: int,
    target_seq_lens_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    sample_src_positions_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    max_model_len: int,
    max_num_reqs: int,
    BLOCK_SIZE: int,
    ADVANCE_DRAFT_POSITIONS: bool,
) -> None:
    """Write the inputs of the second draft step: one row per request, after its accepted tokens."""
    _decode(
        draft_tokens_ptr.numpy(),
        target_seq_lens_ptr.numpy(),
        num_rejected_ptr.numpy(),
        input_ids_ptr.numpy(),
        positions_ptr.numpy(),
        sample_src_positions_ptr.numpy(),
        query_start_loc_ptr.numpy(),
        seq_lens_ptr.numpy(),
        max_model_len,
        ADVANCE_DRAFT_POSITIONS,
    )


@jit
def _decode(
    drafts, target_seq_lens, num_rejected, ids, positions, sample_positions, starts, seq_lens, longest, advance
):  # fmt: skip
    batch = drafts.shape[0]
    for i in range(batch):
        ids[i] = drafts[i]
        sample_positions[i] += 1
        length = target_seq_lens[i] - num_rejected[i]
        if advance:
            positions[i] = min(positions[i] + 1, longest - 1)
            length = min(length + 1, longest)
        seq_lens[i] = length
    for i in range(starts.shape[0]):
        starts[i] = min(i, batch)
    seq_lens[batch:] = 0


def _update_draft_inputs_kernel(
    output_draft_tokens_ptr: torch.Tensor,
    output_draft_tokens_stride: int,
    next_input_hidden_states_ptr: torch.Tensor,
    next_input_hidden_states_stride: int,
    input_ids_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    sample_src_positions_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    draft_tokens_ptr: torch.Tensor,
    current_draft_step_ptr: torch.Tensor,
    hidden_states_ptr: torch.Tensor,
    hidden_states_stride: int,
    hidden_size: int,
    max_model_len: int,
    num_speculative_steps: int,
    BLOCK_SIZE: int,
    ADVANCE_DRAFT_POSITIONS: bool,
) -> None:
    """Keep the drafts of this step and, unless it was the last step, write the inputs of the next one."""
    step, batch = int(current_draft_step_ptr), len(draft_tokens_ptr)
    output_draft_tokens_ptr[:batch, step] = draft_tokens_ptr
    if step >= num_speculative_steps - 1:
        return
    next_input_hidden_states_ptr[:batch, :hidden_size] = hidden_states_ptr[:batch, :hidden_size]
    input_ids_ptr[:batch] = draft_tokens_ptr
    sample_src_positions_ptr[:batch] += 1
    if ADVANCE_DRAFT_POSITIONS:
        positions_ptr[:batch].add_(1).clamp_(max=max_model_len - 1)
        seq_lens_ptr[:batch].add_(1).clamp_(max=max_model_len)
