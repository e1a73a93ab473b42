"""The random target and draft with int8 weights, as llm-compressor writes them (W8A8, dynamic activations)."""

import json
from pathlib import Path
from typing import Any

import torch
from random_llama import write_draft, write_target
from safetensors.torch import load_file, save_file


def quantise(folder: Path, unquantised: tuple[str, ...]) -> Path:
    """Quantise the checkpoint in place, but for the linear layers named."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(dim=1, keepdim=True) / 127
        weights[name + "_scale"] = scale
        weights[name] = (weights[name] / scale).round().to(torch.int8)
    save_file(weights, folder / "model.safetensors")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": number | {"strategy": "channel", "dynamic": False},
                "input_activations": number | {"strategy": "token", "dynamic": True},
            }
        },
        "ignore": list(unquantised),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_int8_target(folder: Path) -> Path:
    """The random target with int8 weights."""
    return quantise(write_target(folder), ("lm_head",))


def write_int8_draft(folder: Path) -> Path:
    """The random draft with int8 weights."""
    return quantise(write_draft(folder), ("lm_head", "fc"))
