"""The likeliest tokens of draft logits, in plain torch: for heads whose logits exist in memory (see `head_topk`)."""

import torch

UNLIKELY = -1e4  # log-probability of a token that the draft gives no finite value for
MOST_LOGITS = 1 << 25  # looked at in one go; top_k takes some 50 bytes for each


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the last dimension, equal values in ascending order of index (`torch.topk` leaves that open).

    values: `[..., n]` without NaN, any float dtype. Returns values (float32) and int64 indices, both `[..., k]`.
    The bits of a float order like a sign-magnitude integer. With the index below them each key is unique.
    """
    floats = values.float() + 0.0  # -0.0 becomes 0.0
    bits = floats.contiguous().view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    index = torch.arange(values.shape[-1], device=values.device)
    key = order * 2**32 + (2**32 - 1 - index)
    chosen = torch.topk(key, k, dim=-1).values & (2**32 - 1)
    indices = 2**32 - 1 - chosen
    return floats.gather(-1, indices), indices


def top_children(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens of each row of draft logits `[..., draft_vocab]`: log-probabilities and ids `[..., k]`.

    Values that are not finite count as UNLIKELY, so that a broken draft makes bad trees and nothing worse.
    """
    rows = max(MOST_LOGITS // logits.shape[-1], 1)
    if logits.dim() == 2 and len(logits) > rows:
        parts = [top_children(part, k) for part in logits.split(rows)]
        return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])
    logits = logits.float()
    log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
    values, ids = top_k(torch.nan_to_num(logits, nan=float("-inf"), posinf=float("-inf")), k)
    return finite(values - log_z), ids


def finite(log_probs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, clamped to [UNLIKELY, 0]. Values that are not finite become UNLIKELY."""
    return torch.nan_to_num(log_probs, nan=UNLIKELY, posinf=UNLIKELY, neginf=UNLIKELY).clamp(UNLIKELY, 0.0)
