"""Tiny EAGLE-3 drafts, written in each checkpoint dialect as its trainer writes them.

dims = Dims()
write_dialect(folder, "modelopt", draft_tensors(dims), dims, aux_layers=(3, 6, 11))
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DIALECTS = ("safeailab", "specforge", "modelopt", "speculators")
IDS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Dims:
    """Sizes of a draft and its target."""

    hidden: int = 32
    target_hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    intermediate: int = 48
    vocab: int = 96
    draft_vocab: int = 40
    target_layers: int = 12
    max_position: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    model_type: str = "llama"


def target_config(dims: Dims, **overrides: Any) -> dict[str, Any]:
    """config.json of a target that a draft of `dims` is made for."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dims.target_hidden,
        "vocab_size": dims.vocab,
        "num_hidden_layers": dims.target_layers,
        "max_position_embeddings": dims.max_position,
    } | overrides


def draft_tensors(
    dims: Dims,
    *,
    seed: int = 0,
    states: int = 3,
    norm_before_fc: bool = False,
    fc_norm: bool = False,
    attention_bias: bool = False,
    embed_tokens: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random canonical tensors, with d2t and t2d if the draft has its own vocabulary.

    states: how many of the target's states the draft fuses.
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    def norm(size: int) -> Tensor:
        return (1 + 0.1 * torch.randn(size, generator=generator)).to(dtype)

    h, q, kv, mlp = dims.hidden, dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim, dims.intermediate
    attention = "layers.0.self_attn."
    tensors = {
        "fc.weight": weight(h, states * dims.target_hidden),
        attention + "q_proj.weight": weight(q, 2 * h),
        attention + "k_proj.weight": weight(kv, 2 * h),
        attention + "v_proj.weight": weight(kv, 2 * h),
        attention + "o_proj.weight": weight(h, q),
        "layers.0.hidden_norm.weight": norm(h),
        "layers.0.input_layernorm.weight": norm(h),
        "layers.0.post_attention_layernorm.weight": norm(h),
        "layers.0.mlp.gate_proj.weight": weight(mlp, h),
        "layers.0.mlp.up_proj.weight": weight(mlp, h),
        "layers.0.mlp.down_proj.weight": weight(h, mlp),
        "norm.weight": norm(h),
        "lm_head.weight": weight(dims.draft_vocab, h),
    }
    if dims.model_type == "qwen3":
        tensors |= {attention + f"{x}_norm.weight": norm(dims.head_dim) for x in "qk"}
    if attention_bias:
        tensors |= {
            attention + f"{x}_proj.bias": weight(n) for x, n in {"q": q, "k": kv, "v": kv, "o": h}.items()
        }
    if norm_before_fc:
        tensors["input_norm.weight"] = norm(states * dims.target_hidden)
    if fc_norm:
        tensors |= {f"fc_norm.{i}.weight": norm(dims.target_hidden) for i in range(states)}
    if embed_tokens or h != dims.target_hidden:
        tensors["embed_tokens.weight"] = weight(dims.vocab, h)
    if dims.draft_vocab != dims.vocab:
        ids = torch.randperm(dims.vocab, generator=generator)[: dims.draft_vocab].sort().values
        tensors["d2t"] = ids - torch.arange(dims.draft_vocab)
        tensors["t2d"] = torch.zeros(dims.vocab, dtype=torch.bool).index_fill_(0, ids, True)
    return tensors


def write_dialect(
    folder: Path,
    dialect: str,
    tensors: dict[str, Tensor],
    dims: Dims,
    *,
    aux_layers: tuple[int, ...] | None = None,
    norm_before_residual: bool = False,
    norm_before_fc: bool = False,
    fc_norm: bool = False,
    norm_output: bool = False,
    attention_bias: bool = False,
    files: str = "safetensors",
    verifier: str = "a/target",
    speculative_tokens: int = 3,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint as the trainers of `dialect` would.

    Args:
        tensors: canonical names.
        aux_layers: after-k ids, written in the dialect's convention; None: the config names none.
        files: "safetensors", "sharded" (two shards and an index), "bin" or "sharded bin".
        config: keys of config.json to add or replace; a value of None removes the key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layer = _layer_config(dims, attention_bias)
    flags: dict[str, Any] = {
        "draft_vocab_size": dims.draft_vocab,
        "norm_before_residual": norm_before_residual,
        "norm_before_fc": norm_before_fc,
    }
    flags |= {key: True for key, value in {"fc_norm": fc_norm, "norm_output": norm_output}.items() if value}
    if dims.target_hidden != dims.hidden or dialect == "speculators":
        flags["target_hidden_size"] = dims.target_hidden
    after_layers = None if aux_layers is None else list(aux_layers)
    outputs = None if aux_layers is None else [i - 1 for i in aux_layers]
    if dialect == "safeailab":
        values = layer | flags | _safeailab(dims, after_layers)
    elif dialect == "specforge":
        values = layer | flags | _specforge(dims, outputs)
    elif dialect == "modelopt":
        del flags["norm_before_fc"]  # ModelOpt writes it into eagle_config
        values = layer | flags | _modelopt(dims, outputs, norm_before_fc)
    elif dialect == "speculators":
        values = flags | _speculators(dims, layer, after_layers, verifier, speculative_tokens)
    else:
        raise ValueError(f"dialect: expected one of {DIALECTS}, found {dialect!r}")
    values = {key: value for key, value in (values | (config or {})).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    write_weights(folder, _named(tensors, dialect), files)
    return folder


def _layer_config(dims: Dims, attention_bias: bool) -> dict[str, Any]:
    return {
        "model_type": dims.model_type,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "hidden_act": "silu",
        "vocab_size": dims.vocab,
        "max_position_embeddings": dims.max_position,
        "rms_norm_eps": dims.rms_norm_eps,
        "attention_bias": attention_bias,
        "tie_word_embeddings": False,
    }


def _rope(dims: Dims) -> dict[str, Any]:
    """As transformers before version 5 writes it."""
    return {"rope_theta": dims.rope_theta, "rope_scaling": None}


def _safeailab(dims: Dims, layers: list[int] | None) -> dict[str, Any]:
    name = "Qwen3ForCausalLM" if dims.model_type == "qwen3" else "LlamaForCausalLM"
    return _rope(dims) | {"architectures": [name], IDS: layers}


def _specforge(dims: Dims, outputs: list[int] | None) -> dict[str, Any]:
    name = "Eagle3Qwen3ForCausalLM" if dims.model_type == "qwen3" else "LlamaForCausalLMEagle3"
    eagle_config = {"use_aux_hidden_state": True, IDS: outputs}
    return _rope(dims) | {"architectures": [name], "eagle_config": eagle_config}


def _modelopt(dims: Dims, outputs: list[int] | None, norm_before_fc: bool) -> dict[str, Any]:
    values = _specforge(dims, outputs)
    values["eagle_config"] |= {
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "norm_before_fc": norm_before_fc,
    }
    return values


def _speculators(
    dims: Dims, layer: dict[str, Any], layers: list[int] | None, verifier: str, speculative_tokens: int
) -> dict[str, Any]:
    rope = {"rope_theta": dims.rope_theta, "rope_type": "default"}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": speculative_tokens}],
            "verifier": {"name_or_path": verifier, "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layer | {"rope_parameters": rope},
        IDS: layers,
    }


def _named(tensors: dict[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """The tensors under the dialect's names."""
    if dialect in ("safeailab", "specforge"):
        return {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    if dialect == "modelopt":
        return {name: tensor for name, tensor in tensors.items() if name != "t2d"}
    return tensors


def write_weights(folder: Path, tensors: dict[str, Tensor], files: str) -> None:
    """Write the weight files alone, under the names given."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    suffix, save, stem = (
        (".bin", torch.save, "pytorch_model") if "bin" in files else (".safetensors", save_file, "model")
    )
    if "sharded" not in files:
        save(tensors, folder / f"{stem}{suffix}")
        return
    weight_map = {name: f"{stem}-0000{1 + i % 2}-of-00002{suffix}" for i, name in enumerate(tensors)}
    for shard in sorted(set(weight_map.values())):
        save({name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}, folder / shard)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
