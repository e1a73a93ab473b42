"""A LoRA adapter for the random target."""

import json
from pathlib import Path

import torch
from random_llama import HEAD_DIM, HEADS, HIDDEN, LAYERS
from safetensors.torch import save_file


def write_adapter(folder: Path, rank: int = 4) -> Path:
    """LoRA on the target's q_proj, strong enough to change its text."""
    torch.manual_seed(5)
    weights = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, HIDDEN) * 0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(HEADS * HEAD_DIM, rank) * 0.5
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
