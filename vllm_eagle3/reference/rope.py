"""Frequencies of rotary embeddings, computed as in vLLM's rotary layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TYPES = ("default", "linear", "llama3", "yarn")


def rope_frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [rotated / 2] in fp32 and the factor on cos and sin.

    rope: `rope_parameters` of transformers 5. rotated: head_dim times `partial_rotary_factor`; the rest of a head
    is not rotated. Raises ValueError for a rope type that is not in TYPES.
    """
    kind = rope.get("rope_type", "default")
    if kind not in TYPES:
        raise ValueError(f"rope_type: expected one of {', '.join(TYPES)}, found {kind!r}")
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    theta = float(rope["rope_theta"])
    inv = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if kind == "linear":
        return inv / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv, rope), 1.0
    if kind == "yarn":
        return _yarn(inv, rope, dim, theta), _yarn_scale(rope)
    return inv, 1.0


def _llama3(inv: Tensor, rope: Mapping[str, Any]) -> Tensor:
    wavelength = 2 * torch.pi / inv
    old = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return inv * (smooth + (1 - smooth) / rope["factor"])


def _yarn(inv: Tensor, rope: Mapping[str, Any], dim: int, theta: float) -> Tensor:
    """YaRN (arXiv 2309.00071).

    Frequencies that turn `beta_fast` times or more within the old length stay unchanged. Those that turn `beta_slow`
    times or less are divided by the factor. Between the two, the change is linear.
    """
    old = rope["original_max_position_embeddings"]

    def turns_at(turns: float) -> float:
        return dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns_at(rope.get("beta_fast") or 32), turns_at(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    divided = ramp.clamp(0, 1)
    return inv / rope["factor"] * divided + inv * (1 - divided)


def _yarn_scale(rope: Mapping[str, Any]) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)
