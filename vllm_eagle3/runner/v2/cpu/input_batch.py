"""CPU forms of the kernels of vllm.v1.worker.gpu.input_batch."""

import numpy as np
import torch

from vllm_eagle3.kernels._numba import jit

UPSTREAM = "vllm.v1.worker.gpu.input_batch"
NO_COUNTS, NO_STARTS = np.zeros((1, 0), np.int32), np.zeros(0, np.int32)


def _prepare_prefill_inputs_kernel(
    input_ids_ptr: torch.Tensor,
    next_prefill_tokens_ptr: torch.Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Write the prompt's tokens of requests that prefill, and the num_lookahead tokens after them."""
    _prefill(
        input_ids_ptr.numpy(),
        next_prefill_tokens_ptr.view(num_lookahead, -1).numpy(),
        idx_mapping_ptr.numpy(),
        query_start_loc_ptr.numpy(),
        all_token_ids_ptr.numpy(),
        prefill_lens_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
    )


@jit
def _prefill(ids, following, requests, starts, tokens, prefill_lens, computed):
    for i in range(requests.shape[0]):
        request, first = requests[i], starts[i]
        done, end = computed[request], prefill_lens[request]
        if done >= end:
            continue
        length = starts[i + 1] - first
        for j in range(length):
            ids[first + j] = tokens[request, done + j]
        for j in range(following.shape[0]):
            position = done + length + j
            following[j, request] = tokens[request, position] if position < end else 0


def _prepare_pos_seq_lens_kernel(
    pos_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Write each token's position and each request's length; 0 after the last request."""
    _positions(
        pos_ptr.numpy(),
        seq_lens_ptr.numpy(),
        idx_mapping_ptr.numpy(),
        query_start_loc_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
    )


@jit
def _positions(positions, seq_lens, requests, starts, computed):
    batch = requests.shape[0]
    for i in range(batch):
        done, first = computed[requests[i]], starts[i]
        seq_lens[i] = done + starts[i + 1] - first
        for token in range(first, starts[i + 1]):
            positions[token] = done + token - first
    seq_lens[batch:] = 0


def _combine_sampled_and_draft_tokens_kernel(
    input_ids_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    draft_tokens_ptr: torch.Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """Write the rows that get logits. After the prompt, also write the last sampled token and the drafts."""
    _combine(
        input_ids_ptr.numpy(),
        idx_mapping_ptr.numpy(),
        last_sampled_tokens_ptr.view(-1).numpy(),
        query_start_loc_ptr.numpy(),
        seq_lens_ptr.numpy(),
        prefill_len_ptr.numpy(),
        draft_tokens_ptr.numpy(),
        cu_num_logits_ptr.numpy(),
        logits_indices_ptr.numpy(),
        NUM_NEW_SAMPLED_TOKENS,
    )


@jit
def _combine(ids, requests, last, starts, seq_lens, prefill_lens, drafts, cu_logits, indices, new):
    for i in range(requests.shape[0]):
        request, first, end = requests[i], cu_logits[i], starts[i + 1]
        count = cu_logits[i + 1] - first
        for j in range(count):
            indices[first + j] = end - count + j
        if seq_lens[i] <= prefill_lens[request]:
            continue
        if new > 0 and seq_lens[i] - count >= prefill_lens[request]:
            ids[end - count] = last[request]
        for j in range(count - new):
            ids[end - count + new + j] = drafts[request, j]


def _get_num_sampled_and_rejected_kernel(
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
) -> None:
    """Write how many tokens were sampled and drafts rejected. Both are 0 before the end of the prompt."""
    _count_rejected(
        num_sampled_ptr.numpy(),
        num_rejected_ptr.numpy(),
        seq_lens_ptr.numpy(),
        cu_num_logits_ptr.numpy(),
        idx_mapping_ptr.numpy(),
        prefill_len_ptr.numpy(),
    )


@jit
def _count_rejected(num_sampled, num_rejected, seq_lens, cu_logits, requests, prefill_lens):
    for i in range(requests.shape[0]):
        if seq_lens[i] < prefill_lens[requests[i]]:
            num_sampled[i] = num_rejected[i] = 0
        else:
            num_rejected[i] = cu_logits[i + 1] - cu_logits[i] - num_sampled[i]


def _post_update_kernel(
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    output_bin_counts_ptr: torch.Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: torch.Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor | None,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,
    num_warps: int = 1,
) -> None:
    """Append the sampled tokens to their requests, and advance the number of computed tokens."""
    _append(
        idx_mapping_ptr.numpy(),
        num_computed_tokens_ptr.numpy(),
        last_sampled_tokens_ptr.view(-1).numpy(),
        NO_COUNTS if output_bin_counts_ptr is None else output_bin_counts_ptr.numpy(),
        sampled_tokens_ptr.numpy(),
        num_sampled_ptr.numpy(),
        num_rejected_ptr.numpy(),
        NO_STARTS if query_start_loc_ptr is None else query_start_loc_ptr.numpy(),
        all_token_ids_ptr.numpy(),
        total_len_ptr.numpy(),
    )


@jit
def _append(requests, computed, last, counts, sampled, num_sampled, num_rejected, starts, tokens, total):
    for i in range(requests.shape[0]):
        request = requests[i]
        if request < 0:
            continue
        length, count = total[request], num_sampled[i]
        if count > 0:
            last[request] = sampled[i, count - 1]
            total[request] = length + count
        for j in range(count):
            tokens[request, length + j] = sampled[i, j]
            if counts.shape[1] > 0:
                counts[request, sampled[i, j]] += 1
        rows = starts[i + 1] - starts[i] if starts.shape[0] > 0 else 0
        computed[request] += rows - num_rejected[i]


def _post_update_num_computed_tokens_kernel(
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
) -> None:
    """Count the tokens of this step as computed."""
    requests = idx_mapping_ptr.long()
    num_computed_tokens_ptr[requests] += query_start_loc_ptr[: len(requests) + 1].diff()


def _expand_idx_mapping_kernel(
    idx_mapping_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    BLOCK_SIZE: int,
) -> None:
    """Write each row's request and its place within the request's rows."""
    _expand(
        idx_mapping_ptr.numpy(),
        expanded_idx_mapping_ptr.numpy(),
        expanded_local_pos_ptr.numpy(),
        cu_num_logits_ptr.numpy(),
    )


@jit
def _expand(requests, expanded, local, cu_logits):
    for i in range(requests.shape[0]):
        for row in range(cu_logits[i], cu_logits[i + 1]):
            expanded[row] = requests[i]
            local[row] = row - cu_logits[i]
