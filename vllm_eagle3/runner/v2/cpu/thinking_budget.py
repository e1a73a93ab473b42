"""CPU forms of the kernels of vllm.v1.worker.gpu.sample.thinking_budget."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.sample.thinking_budget"
FORCED = 1.0e9  # upstream's logit of a token that is forced


def _update_committed_marker_cache_kernel(
    req_ids_ptr: torch.Tensor,
    thinking_token_budget_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,
    cached_last_start_ptr: torch.Tensor,
    cached_last_end_ptr: torch.Tensor,
    cached_scan_pos_ptr: torch.Tensor,
    reasoning_start_token_ids_ptr: torch.Tensor,
    natural_reasoning_end_token_ids_ptr: torch.Tensor,
    START_LEN: int,
    NATURAL_END_LEN: int,
    MAX_LEN: int,
    BLOCK: int,
) -> None:
    """Keep the last places where each request's text begins and ends to think. Searches only the new text."""
    start, end = reasoning_start_token_ids_ptr.tolist(), natural_reasoning_end_token_ids_ptr.tolist()
    for request in req_ids_ptr.tolist():
        if thinking_token_budget_ptr[request] < 0:
            continue
        length, begin = int(total_len_ptr[request]), int(cached_scan_pos_ptr[request])
        if begin > length:  # another request's
            begin = 0
            cached_last_start_ptr[request] = cached_last_end_ptr[request] = -1
        text = all_token_ids_ptr[request, :length].tolist()
        for marker, last in ((start, cached_last_start_ptr), (end, cached_last_end_ptr)):
            found = last_match(text, marker, begin)
            if found >= 0:
                last[request] = found
        cached_scan_pos_ptr[request] = max(length - (MAX_LEN - 1), 0)


def _thinking_budget_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    thinking_token_budget_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    cached_last_start_ptr: torch.Tensor,
    cached_last_end_ptr: torch.Tensor,
    reasoning_start_token_ids_ptr: torch.Tensor,
    natural_reasoning_end_token_ids_ptr: torch.Tensor,
    reasoning_end_token_ids_ptr: torch.Tensor,
    START_LEN: int,
    NATURAL_END_LEN: int,
    END_LEN: int,
) -> None:
    """Force the next token of the end marker if a request has used its thinking budget."""
    start, end = reasoning_start_token_ids_ptr.tolist(), natural_reasoning_end_token_ids_ptr.tolist()
    forced, places = reasoning_end_token_ids_ptr.tolist(), expanded_local_pos_ptr.tolist()
    for row, request in enumerate(expanded_idx_mapping_ptr.tolist()):
        budget, length = int(thinking_token_budget_ptr[request]), int(total_len_ptr[request])
        if budget < 0:
            continue
        text = all_token_ids_ptr[request, :length].tolist()
        text += input_ids_ptr[row - places[row] + 1 : row + 1].tolist()
        # The cache has the markers within the committed text. Markers that reach into the drafts are searched here.
        last_start = last_match(text, start, max(length - START_LEN + 1, 0))
        last_end = last_match(text, end, max(length - NATURAL_END_LEN + 1, 0))
        last_start = last_start if last_start >= 0 else int(cached_last_start_ptr[request])
        last_end = last_end if last_end >= 0 else int(cached_last_end_ptr[request])
        thought = len(text) - (last_start + START_LEN)
        if last_start < 0 or last_start <= last_end or thought < budget:
            continue
        done = max(n for n in range(END_LEN) if n <= len(text) and text[len(text) - n :] == forced[:n])
        logits_ptr[row, forced[done]] = FORCED


def last_match(text: list[int], marker: list[int], begin: int) -> int:
    """Last place from `begin` on at which `text` contains `marker`; -1 for none."""
    for place in range(len(text) - len(marker), begin - 1, -1):
        if text[place : place + len(marker)] == marker:
            return place
    return -1
