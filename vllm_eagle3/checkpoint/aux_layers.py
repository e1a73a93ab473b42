"""Which target layers a draft reads, in one convention: id k is the state after k layers (0: the embedding).

This is vLLM's convention (`EagleModelMixin._maybe_add_hidden_state`) and that of HF's `hidden_states[k]`.
Formats that name layers by their output (SpecForge, ModelOpt) are one lower.
"""

from collections.abc import Mapping
from typing import Any

from vllm_eagle3.checkpoint.errors import CheckpointError

IDS = "eagle_aux_hidden_state_layer_ids"
SET_OPTION = 'set the option aux_layers (--additional-config \'{"eagle3": {"aux_layers": [..]}}\')'
AuxLayers = tuple[int, int, int]


def default_aux_layers(num_layers: int) -> AuxLayers:
    """The reference implementation's choice for a target of `num_layers` layers: (2, n//2, n-3)."""
    return 2, num_layers // 2, num_layers - 3


def resolve_aux_layers(
    config: Mapping[str, Any],
    *,
    is_speculators: bool,
    num_target_layers: int | None,
    override: Any,
    source: str,
) -> tuple[AuxLayers | None, str]:
    """After-k ids and a note that says where they come from. None: neither the config nor the target says.

    Raises:
        CheckpointError: ids that are not three strictly increasing ones within 0..n, or contradictory ones.
    """
    n = num_target_layers
    if override is not None:
        ids = _checked(override, n, "the option aux_layers", source)
        return ids, f"aux layers {list(ids)}: from the option"

    found: dict[AuxLayers, str] = {}
    nested = config.get("eagle_config") or {}
    if config.get(IDS) is not None:
        meaning = (
            "input of the layer, as speculators means" if is_speculators else "after-k, as vLLM reads it"
        )
        found[_checked(config[IDS], n, IDS, source)] = f"{IDS} {list(config[IDS])} ({meaning})"
    if nested.get(IDS) is not None:
        ids, meaning = _from_layer_outputs(nested[IDS], n, f"eagle_config.{IDS}", source)
        found[ids] = f"eagle_config.{IDS} {list(nested[IDS])} ({meaning})"
    if nested.get("layer_ids") is not None:
        ids = _checked(nested["layer_ids"], n, "eagle_config.layer_ids", source)
        found[ids] = f"eagle_config.layer_ids {list(ids)} (after-k, as vLLM reads it)"

    if len(found) > 1:
        readings = "; ".join(f"{text} -> {list(ids)}" for ids, text in found.items())
        raise CheckpointError(f"{source}: contradictory aux-layer ids: {readings}. To choose, {SET_OPTION}.")
    if found:
        ids, text = found.popitem()
        return ids, f"aux layers {list(ids)}: from {text}"
    if n is None:
        return None, "aux layers: not in the config, and the target's number of layers is not known"
    ids = default_aux_layers(n)
    if not 0 <= ids[0] < ids[1] < ids[2]:
        raise CheckpointError(
            f"{source}: no aux-layer ids, and the default (2, n//2, n-3) = {ids} is not strictly increasing "
            f"for a target of {n} layers; {SET_OPTION}."
        )
    return ids, f"aux layers {list(ids)}: not in the config, so the default (2, n//2, n-3) for {n} layers"


def _from_layer_outputs(ids: Any, n: int | None, key: str, source: str) -> tuple[AuxLayers, str]:
    """Ids that name layers by their output -> after-k ids (+1).

    The last layer's output is id n-1, so a triple that contains n itself can only be after-k already
    (gpt-oss-120b-Eagle3-v3; sgl-project/sglang#32334).
    """
    as_ints = _ints(ids, key, source)
    if n is not None and max(as_ints, default=0) == n:
        return _checked(ids, n, key, source), f"after-k: as layer outputs {n} would lie beyond the {n} layers"
    shifted = _checked([i + 1 for i in as_ints], n, f"{key} + 1", source)
    meaning = "output of the layer, so +1"
    if n is not None and tuple(as_ints) == default_aux_layers(n):
        meaning += (
            f"; they equal this target's default after-k ids: if acceptance is low, try aux_layers {as_ints}"
        )
    return shifted, meaning


def _ints(ids: Any, key: str, source: str) -> list[int]:
    if not isinstance(ids, list | tuple) or any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{source}: {key}: expected a list of three layer ids, found {ids!r}")
    return list(ids)


def _checked(ids: Any, n: int | None, key: str, source: str) -> AuxLayers:
    values = _ints(ids, key, source)
    if len(values) != 3 or not 0 <= values[0] < values[1] < values[2] <= (values[-1] if n is None else n):
        within = "0 or more" if n is None else f"within 0..{n} (the target's layers)"
        raise CheckpointError(
            f"{source}: {key}: expected three strictly increasing ids {within}, found {values}. "
            f"If the checkpoint is for this target, {SET_OPTION}."
        )
    return values[0], values[1], values[2]
