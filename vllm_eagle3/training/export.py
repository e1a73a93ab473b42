"""Writes drafts to disk, in the flat SafeAILab/SpecForge form or in the speculators form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_eagle3.reference.config import PlainDraftConfig
from vllm_eagle3.reference.draft import DraftModel

FORMATS = ("flat", "speculators")
OPTIONS = ("norm_before_residual", "norm_output", "fc_norm")


def body(config: PlainDraftConfig) -> dict[str, Any]:
    """The decoder layer as a transformers config: Qwen3 if q and k are normed per head, else Llama."""
    return {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": config.rope_parameters,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def flat_config(config: PlainDraftConfig, torch_dtype: str) -> dict[str, Any]:
    """config.json of the flat form.

    Its nested aux ids name the *output* of a layer, so they are one less than this project's.
    """
    return body(config) | {
        "architectures": ["Eagle3Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLMEagle3"],
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [k - 1 for k in config.aux_layers],
            "use_aux_hidden_state": True,
        },
        **{name: getattr(config, name) for name in OPTIONS},
        "norm_before_fc": config.input_norm,
        "torch_dtype": torch_dtype,
    }


def speculators_config(
    config: PlainDraftConfig,
    torch_dtype: str,
    verifier: str,
    architectures: list[str],
    num_speculative_tokens: int,
) -> dict[str, Any]:
    """config.json of the speculators form. Its aux ids name the *input* of a layer, as this project's do."""
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": num_speculative_tokens,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"name_or_path": verifier, "architectures": architectures},
        },
        "transformer_layer_config": body(config),
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        **{name: getattr(config, name) for name in OPTIONS},
        "norm_before_fc": config.input_norm,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": torch_dtype,
    }


def export(
    model: DraftModel,
    path: str | Path,
    form: str = "flat",
    dtype: torch.dtype = torch.bfloat16,
    verifier: str = "",
    verifier_architectures: tuple[str, ...] = ("LlamaForCausalLM",),
    num_speculative_tokens: int = 5,
) -> Path:
    """Write config.json and model.safetensors, each in one atomic step, and return the directory.

    flat: the layer's prefix is `midlayer.`, and there are no embeddings (the target's are used). speculators: the
    prefix is `layers.0.`, and the embeddings are included. Raises ValueError for an option that the flat form cannot
    express.
    """
    if form not in FORMATS:
        raise ValueError(f"form must be one of {', '.join(FORMATS)}, found {form!r}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    name = str(dtype).removeprefix("torch.")
    tensors = {}
    for key, value in model.state_dict().items():
        if key == "embed_tokens.weight" and form == "flat":
            continue
        if form == "flat":
            key = key.replace("layers.0.", "midlayer.")
        tensors[key] = (value if key == "d2t" else value.to(dtype)).detach().cpu().contiguous()
    t2d = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    t2d[model.target_ids.cpu()] = True
    tensors["t2d"] = t2d
    if form == "flat":
        config = flat_config(model.config, name)
    else:
        config = speculators_config(
            model.config, name, verifier, list(verifier_architectures), num_speculative_tokens
        )
    partial = path / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(path / "model.safetensors")
    text = path / "config.json.partial"
    text.write_text(json.dumps(config, indent=2) + "\n")
    text.replace(path / "config.json")
    return path
