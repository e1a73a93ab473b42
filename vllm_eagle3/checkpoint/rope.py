"""Reads the rotary embedding settings of old and new HF configs into one `rope_parameters` dict."""

import math
from collections.abc import Mapping
from typing import Any

from vllm_eagle3.checkpoint.errors import CheckpointError
from vllm_eagle3.checkpoint.reader import MOST_POSITIONS

DEFAULT_THETA = 10000.0  # transformers' default for llama and qwen3


def resolve_rope(layer: Mapping[str, Any], *, source: str) -> tuple[dict[str, Any], list[str]]:
    """`rope_parameters` as transformers 5 writes it, or made from `rope_theta` and `rope_scaling` (transformers 4).

    Returns:
        The dict, with at least `rope_type` and `rope_theta`; notes.

    Raises:
        CheckpointError: a value that is not a dict, or two different bases.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(layer.get(key) or {}, Mapping):
            raise CheckpointError(f"{source}: {key}: expected an object, found {layer[key]!r}")
    notes: list[str] = []
    given = layer.get("rope_parameters") or {}
    layer_type = (layer.get("layer_types") or ["full_attention"])[0]
    given = given.get(layer_type, given)  # one dict per layer type
    if not isinstance(given, Mapping):
        raise CheckpointError(
            f"{source}: rope_parameters.{layer_type}: expected an object, found {given!r:.200}"
        )
    rope = {**(layer.get("rope_scaling") or {}), **given}
    theta = layer.get("rope_theta")
    if theta is not None and rope.setdefault("rope_theta", theta) != theta:
        raise CheckpointError(
            f"{source}: rope_theta {theta} contradicts {rope['rope_theta']} in rope_parameters or _scaling"
        )
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = DEFAULT_THETA
        notes.append(f"rope_theta: missing, so transformers' default {DEFAULT_THETA:g}")
    old_style = rope.pop("type", None)
    if rope.get("rope_type") is None:
        rope["rope_type"] = "default" if old_style in (None, "mrope") else old_style
    if layer.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", layer["partial_rotary_factor"])
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    for key, value, low, high in (
        ("original_max_position_embeddings", original, 1, MOST_POSITIONS),
        ("factor", factor, 0, MOST_POSITIONS),
        ("factor x original_max_position_embeddings", _product(original, factor), 0, MOST_POSITIONS),
    ):
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):
            raise CheckpointError(
                f"{source}: rope: {key}: expected a number from {low} to {high}, found {value!r:.100}"
            )
    return rope, notes


def _product(*numbers: Any) -> float | None:
    return math.prod(numbers) if all(isinstance(n, int | float) for n in numbers) else None
