"""CPU forms of the kernels of vllm.v1.worker.gpu.sample.logprob."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.sample.logprob"


def _topk_log_softmax_kernel(
    output_ptr: torch.Tensor,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    topk_ids_ptr: torch.Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """Write the log-probabilities of the given tokens of each row."""
    logits = logits_ptr[:, :vocab_size].float()
    torch.sub(logits.gather(1, topk_ids_ptr), logits.logsumexp(dim=-1, keepdim=True), out=output_ptr)


def _ranks_kernel(
    output_ptr: torch.Tensor,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    token_ids_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Write how many tokens of each row are at least as likely as the given one."""
    logits = logits_ptr[:, :vocab_size]
    output_ptr.copy_((logits >= logits.gather(1, token_ids_ptr.long()[:, None])).sum(dim=-1))


def _fill_logprob_token_ids_kernel(
    out_token_ids_ptr: torch.Tensor,
    out_token_ids_stride: int,
    out_valid_mask_ptr: torch.Tensor,
    out_valid_mask_stride: int,
    sampled_token_ids_ptr: torch.Tensor,
    topk_indices_ptr: torch.Tensor,
    topk_indices_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    num_per_req_token_ids_ptr: torch.Tensor,
    per_req_token_ids_ptr: torch.Tensor,
    per_req_token_ids_stride: int,
    NUM_TOPK: int,
    PADDED_COLS: int,
) -> None:
    """Write the tokens whose log-probabilities a row returns: the sampled one, then the requested or the top ones."""
    out_token_ids_ptr[:, 0] = sampled_token_ids_ptr
    out_valid_mask_ptr[:, 0] = True
    for row, request in enumerate(expanded_idx_mapping_ptr.tolist()):
        count = int(num_per_req_token_ids_ptr[request])
        source = per_req_token_ids_ptr[request, :count] if count else topk_indices_ptr[row, :NUM_TOPK]
        out_token_ids_ptr[row, 1 : 1 + len(source)] = source
        out_valid_mask_ptr[row, 1 : 1 + len(source)] = True
