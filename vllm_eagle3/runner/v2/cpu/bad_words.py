"""CPU form of the kernel of vllm.v1.worker.gpu.sample.bad_words."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.sample.bad_words"


def _bad_words_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    bad_word_token_ids_ptr: torch.Tensor,
    bad_word_token_ids_stride: int,
    bad_word_offsets_ptr: torch.Tensor,
    bad_word_offsets_stride: int,
    num_bad_words_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,
    total_len_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
) -> None:
    """Mask the last token of each bad word whose other tokens end the output (with the drafts before the row)."""
    places = expanded_local_pos_ptr.tolist()
    for row, request in enumerate(expanded_idx_mapping_ptr.tolist()):
        count = int(num_bad_words_ptr[request])
        if count == 0:
            continue
        output = all_token_ids_ptr[request, prompt_len_ptr[request] : total_len_ptr[request]].tolist()
        output += input_ids_ptr[row - places[row] + 1 : row + 1].tolist()
        ends = bad_word_offsets_ptr[request, : count + 1].tolist()
        tokens = bad_word_token_ids_ptr[request, : ends[-1]].tolist()
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            *before, last = tokens[start:end]
            if len(before) <= len(output) and before == output[len(output) - len(before) :]:
                logits_ptr[row, last] = float("-inf")
