"""Which layers of the target a draft reads, in one convention: id k is the state after k layers (0: the embedding).

This is vLLM's convention (`EagleModelMixin._maybe_add_hidden_state`) and that of HF's `hidden_states[k]`.
SpecForge and ModelOpt number a layer's output by the layer itself, so their ids are lower by one.
"""

from collections.abc import Mapping
from typing import Any

from vllm_eagle3.checkpoint.errors import CheckpointError

IDS = "eagle_aux_hidden_state_layer_ids"
SET_OPTION = 'set the option aux_layers (--additional-config \'{"eagle3": {"aux_layers": [..]}}\')'
AuxLayers = tuple[int, ...]
USUAL = 3  # states that a draft fuses, unless its config says otherwise


def default_aux_layers(num_layers: int) -> AuxLayers:
    """The reference implementation's choice for a target of `num_layers` layers: (2, n//2, n-3)."""
    return 2, num_layers // 2, num_layers - 3


def resolve_aux_layers(
    config: Mapping[str, Any],
    *,
    is_speculators: bool,
    num_target_layers: int | None,
    override: Any,
    stated_number: int | None = None,
    source: str,
) -> tuple[AuxLayers | None, str]:
    """After-k ids, and a note that says where they come from.

    The ids are None where neither the config nor the target determines them. Most drafts read three states, but any
    number is allowed. `stated_number` is the number that the config states.

    Raises:
        CheckpointError: ids that are not strictly increasing within 0..n, contradictory ones, or too few or too many.
    """
    ids, note = _resolve(config, is_speculators, num_target_layers, override, stated_number, source)
    if ids is not None and stated_number not in (None, len(ids)):
        raise CheckpointError(
            f"{source}: the config states {stated_number} aux hidden states, but there are {len(ids)} aux layers: "
            f"{note}. To choose, {SET_OPTION}."
        )
    return ids, note


def _resolve(
    config: Mapping[str, Any],
    is_speculators: bool,
    n: int | None,
    override: Any,
    stated_number: int | None,
    source: str,
) -> tuple[AuxLayers | None, str]:
    if override is not None:
        ids = _checked(override, n, "the option aux_layers", source)
        return ids, f"aux layers {list(ids)}: from the option"

    found: dict[AuxLayers, str] = {}
    nested = config.get("eagle_config") or {}
    if _states(config, IDS):
        meaning = (
            "input of the layer, as speculators means" if is_speculators else "after-k, as vLLM reads it"
        )
        found[_checked(config[IDS], n, IDS, source)] = f"{IDS} {config[IDS]} ({meaning})"
    if _states(nested, IDS):
        ids, meaning = _from_layer_outputs(nested[IDS], n, f"eagle_config.{IDS}", source)
        found[ids] = f"eagle_config.{IDS} {nested[IDS]} ({meaning})"
    if _states(nested, "layer_ids"):
        in_order = _in_layer_order(nested["layer_ids"], "eagle_config.layer_ids", source)
        ids = _checked(in_order, n, "eagle_config.layer_ids", source)
        found[ids] = f"eagle_config.layer_ids {list(ids)} (after-k, as vLLM reads it)"

    if len(found) > 1:
        readings = "; ".join(f"{text} -> {list(ids)}" for ids, text in found.items())
        raise CheckpointError(f"{source}: contradictory aux-layer ids: {readings}. To choose, {SET_OPTION}.")
    if found:
        ids, text = found.popitem()
        return ids, f"aux layers {list(ids)}: from {text}"
    if n is None:
        return None, "aux layers: not in the config, and the target's number of layers is not known"
    if stated_number not in (None, USUAL):
        raise CheckpointError(
            f"{source}: the config states {stated_number} aux hidden states but names no layers. There is a default "
            f"only for {USUAL}; {SET_OPTION}."
        )
    ids = default_aux_layers(n)
    if not 0 <= ids[0] < ids[1] < ids[2]:
        raise CheckpointError(
            f"{source}: no aux-layer ids, and the default (2, n//2, n-3) = {ids} is not strictly increasing "
            f"for a target of {n} layers; {SET_OPTION}."
        )
    return ids, f"aux layers {list(ids)}: not in the config, so the default (2, n//2, n-3) for {n} layers"


def _states(values: Mapping[str, Any], key: str) -> bool:
    """Whether ids are given; an empty list means the default, as in vLLM."""
    return values.get(key) is not None and values[key] != []


def _from_layer_outputs(ids: Any, n: int | None, key: str, source: str) -> tuple[AuxLayers, str]:
    """After-k ids from ids that number layers by their output: each grows by one.

    In that convention the last layer of n has id n-1. So a list that contains n holds after-k ids already
    (gpt-oss-120b-Eagle3-v3; sgl-project/sglang#32334).
    """
    as_ints = _in_layer_order(ids, key, source)
    if n is not None and max(as_ints, default=0) == n:
        return (
            _checked(as_ints, n, key, source),
            f"after-k: as layer outputs {n} would lie beyond the {n} layers",
        )
    shifted = _checked([i + 1 for i in as_ints], n, f"{key} + 1", source)
    meaning = "output of the layer, so +1"
    if n is not None and tuple(as_ints) == default_aux_layers(n):
        meaning += (
            f"; they equal this target's default after-k ids: if acceptance is low, try aux_layers {as_ints}"
        )
    return shifted, meaning


def _in_layer_order(ids: Any, key: str, source: str) -> list[int]:
    """Nested ids, sorted.

    ModelOpt writes them in the order of a Python set. Its hooks and vLLM collect the states in the order of the
    layers.
    """
    return sorted(_ints(ids, key, source))


def _ints(ids: Any, key: str, source: str) -> list[int]:
    if not isinstance(ids, list | tuple) or any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{source}: {key}: expected a list of layer ids, found {ids!r}")
    return list(ids)


def _checked(ids: Any, n: int | None, key: str, source: str) -> AuxLayers:
    values = _ints(ids, key, source)
    rising = all(low < high for low, high in zip(values, values[1:], strict=False))
    if not values or not rising or values[0] < 0 or (n is not None and values[-1] > n):
        within = "0 or more" if n is None else f"within 0..{n} (the target's layers)"
        raise CheckpointError(
            f"{source}: {key}: expected strictly increasing ids {within}, found {values}. "
            f"If the checkpoint is for this target, {SET_OPTION}."
        )
    return tuple(values)
