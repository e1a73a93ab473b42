"""Shared by the tests' Llama checkpoints: the common part of config.json, and writing the two files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def llama_config(**shape: Any) -> dict[str, Any]:
    """A config.json for the given sizes, architecture and `torch_dtype`."""
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        **shape,
    }


def save_checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    """Writes config.json and model.safetensors in the config's `torch_dtype`; returns the folder."""
    dtype = getattr(torch, config["torch_dtype"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {name: weight.to(dtype).contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
