"""CPU form of the kernel of vllm.v1.worker.gpu.sample.logit_bias."""

import torch

UPSTREAM = "vllm.v1.worker.gpu.sample.logit_bias"
NEG_INF = float("-inf")


def _bias_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    num_allowed_token_ids_ptr: torch.Tensor,
    allowed_token_ids_ptr: torch.Tensor,
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: torch.Tensor,
    bias_token_ids_ptr: torch.Tensor,
    bias_token_ids_stride: int,
    bias_ptr: torch.Tensor,
    bias_stride: int,
    pos_ptr: torch.Tensor,
    min_lens_ptr: torch.Tensor,
    num_stop_token_ids_ptr: torch.Tensor,
    restore_when_all_masked_ptr: torch.Tensor,
    stop_token_ids_ptr: torch.Tensor,
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
) -> None:
    """Mask all but the allowed tokens, add the biases, mask the stop tokens of answers that are too short for them."""
    for row, request in enumerate(expanded_idx_mapping_ptr.tolist()):
        logits = logits_ptr[row, :vocab_size]
        allowed = allowed_token_ids_ptr[request, : int(num_allowed_token_ids_ptr[request])].long()
        if len(allowed):
            kept = logits[allowed]
            logits.fill_(NEG_INF)
            logits[allowed] = kept
        biases = int(num_logit_bias_ptr[request])
        if biases:
            tokens = bias_token_ids_ptr[request, :biases].long()
            logits[tokens] = (logits[tokens] + bias_ptr[request, :biases]).to(logits.dtype)
        stops = stop_token_ids_ptr[request, : int(num_stop_token_ids_ptr[request])].long()
        if len(stops) and pos_ptr[row] + 1 < min_lens_ptr[request]:
            kept = logits[stops]
            logits[stops] = NEG_INF
            if CHECK_ALL_MASKED_ROWS and restore_when_all_masked_ptr[request] and logits.amax() == NEG_INF:
                finite = kept.isfinite()  # keep a stop token that is the only token a grammar allows
                logits[stops[finite]] = kept[finite]
