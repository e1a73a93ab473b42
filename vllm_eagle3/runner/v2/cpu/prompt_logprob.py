"""CPU form of the kernel of vllm.v1.worker.gpu.sample.prompt_logprob."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.sample.prompt_logprob"


def _prompt_logprobs_token_ids_kernel(
    prompt_logprobs_token_ids_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """Write the token after each row's token. Nothing is read beyond the longest sequence."""
    starts = query_start_loc_ptr.tolist()
    for i, request in enumerate(idx_mapping_ptr.tolist()):
        begin = int(num_computed_tokens_ptr[request]) + 1
        tokens = all_token_ids_ptr[request, begin : begin + starts[i + 1] - starts[i]]
        prompt_logprobs_token_ids_ptr[starts[i] : starts[i] + len(tokens)] = tokens
