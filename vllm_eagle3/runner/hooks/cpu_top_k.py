"""Mends a defect of vLLM on a CPU: top_k without top_p ends the engine in a step that has no rows to mask."""

import torch
from vllm.v1.sample.ops import topk_topp_sampler

_stock = topk_topp_sampler.apply_top_k_only


def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Replaces the function of this name: set all but each row's k [rows] largest logits [rows, vocab] to -inf.

    While speculating, the rows are those of the drafts to verify. A step in which no request has drafts, such as every
    prefill, has no such rows, and upstream takes the maximum of an empty tensor.
    """
    return _stock(logits, k) if len(k) else logits
