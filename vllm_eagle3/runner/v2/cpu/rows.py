"""Reductions over rows of logits.

Upstream's kernels reduce blocks of the vocabulary. Here block 0 gets the result of a whole row, and the other blocks
get values that never win a later reduction.
"""

import torch

from vllm_eagle3.kernels.argmax_rows import argmax_rows

NEG_INF = float("-inf")


def best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest value [n] (fp32) and its first index [n] of each row of logits [n, vocab]."""
    index = argmax_rows(logits)
    return logits.gather(1, index[:, None])[:, 0].float(), index


def write(table: torch.Tensor, values: torch.Tensor, loser: float) -> None:
    """Write one value per row [n] to a table with one value per block [n, blocks]."""
    table.fill_(loser)
    table[:, 0] = values
