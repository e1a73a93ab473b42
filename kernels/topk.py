"""The likeliest tokens of draft logits in plain torch, if the logits are in memory (otherwise see `head_topk`)."""

import torch

UNLIKELY = -1e4  # log-probability of a token for which the draft gives no finite value
MOST_LOGITS = 1 << 25  # processed at a time; top_k needs about 50 bytes for each


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the last dimension. Of equal values the lower index comes first, unlike in `torch.topk`.

    values: `[..., n]` without NaN, any float dtype. Returns values (float32) and int64 indices, both `[..., k]`.
    The bits of floats have the order of sign-magnitude integers. With the index in the lower bits, no two keys are
    equal.
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

    Values that are not finite become UNLIKELY, so that a broken draft gives bad trees but no error.
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
