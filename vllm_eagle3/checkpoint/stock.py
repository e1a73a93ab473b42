"""Which drafts this plugin leaves to vLLM's own EAGLE-3, and why."""

from collections.abc import Mapping
from typing import Any

# Names that vLLM's registry maps to its llama and qwen3 EAGLE-3 classes, and the bare names the reference
# trainer writes (vLLM prefixes those with Eagle3).
LLAMA = {
    "LlamaForCausalLM",
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3MiniMaxM2ForCausalLM",
    "Eagle3Qwen2_5vlForCausalLM",
    "Eagle3Qwen3vlForCausalLM",
}
QWEN3 = {"Qwen3ForCausalLM", "Eagle3Qwen3ForCausalLM"}
PARALLEL_KEYS = ("mask_token_id", "pard_token", "ptd_token_id")


def left_to_stock(config: Mapping[str, Any], layer: Mapping[str, Any]) -> str | None:
    """The reason why vLLM's own EAGLE-3 serves a draft instead of this plugin, or None.

    Args:
        config: the parsed config.json.
        layer: the part of it that describes the layer (speculators nests it; elsewhere it is `config` itself).
    """
    nested = config.get("eagle_config")
    nested = nested if isinstance(nested, Mapping) else {}
    kind = config.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        return f"speculators_model_type is {kind!r}, not 'eagle3'"
    for key in PARALLEL_KEYS:
        if config.get(key) is not None:
            return f"parallel drafting (P-EAGLE): the config has {key}"
    if nested.get("parallel_draft_step") not in (None, 0, 1):
        return f"parallel drafting: eagle_config.parallel_draft_step is {nested['parallel_draft_step']}"
    if layer.get("kv_lora_rank") is not None:
        return "an MLA draft (multi-head latent attention): the config has kv_lora_rank"
    if reason := _unknown_layer(config, layer):
        return reason
    layers = layer.get("num_hidden_layers")
    if isinstance(layers, int) and layers > 1:
        return f"a draft of {layers} layers; this plugin has one"
    if config.get("use_aux_hidden_state") is False or nested.get("use_aux_hidden_state") is False:
        return "use_aux_hidden_state is false: the draft reads the target's last state only"
    return None


def _unknown_layer(config: Mapping[str, Any], layer: Mapping[str, Any]) -> str | None:
    if layer is not config:
        model_type = layer.get("model_type", "llama")
        known = model_type in ("llama", "qwen3")
        return None if known else f"model_type of the draft's layer is {model_type!r}"
    architectures = config.get("architectures") or []
    if not architectures or architectures[0] not in LLAMA | QWEN3:
        return f"architectures is {architectures!r}; known here: {', '.join(sorted(LLAMA | QWEN3))}"
    return None
