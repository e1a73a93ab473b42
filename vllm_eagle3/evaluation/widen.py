"""Targets of any cost that write real text: a model whose MLPs are N times as wide but compute the same.

The added neurons are copies of the existing ones, and their columns of `down_proj` are zero, so that they add nothing.
The widened target costs as much as a larger model and writes the same text, up to rounding, because sums are taken in
another order. Hidden states, KV cache and number of layers do not change, so the original's draft fits.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_eagle3.evaluation.demo_models import cache_folder

WEIGHTS = "model.safetensors"


def widened(target: str | Path, factor: int) -> Path:
    """The directory of a copy of `target` with MLPs `factor` times as wide. It is written to the cache at first use.

    It prints a note on stderr, because figures of such a target must be labelled.

    Raises:
        ValueError: the factor is below 2, `target` is not a directory with config.json and safetensors, or its MLPs
            do not consist of gate_proj, up_proj and down_proj.
    """
    if factor < 2:
        raise ValueError(f"--widen: expected a factor of at least 2, found {factor}")
    source = Path(target)
    if not (source / "config.json").is_file() or not list(source.glob("*.safetensors")):
        raise ValueError(
            f"--widen: expected a directory with config.json and *.safetensors, found none at {source}"
        )
    path = cache_folder() / f"{source.name}-widened-{factor}x"
    sys.stderr.write(
        f"WIDENED TARGET: {source.name} with MLPs {factor} times as wide, which cost time and change no text\n"
    )
    if (path / "config.json").is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        made = Path(work) / "model"
        write(source, made, factor)
        try:
            made.rename(path)  # atomic: of two processes, the first one wins
        except OSError:
            if not (path / "config.json").is_file():
                raise
    return path


def write(source: Path, out: Path, factor: int) -> None:
    """Write the widened model to the new directory `out`. Raises as `widened` does."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "intermediate_size" not in config:
        raise ValueError(f"--widen: {source}/config.json states no intermediate_size")
    tensors, changed = {}, 0
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  not a dict
                tensor = weights.get_tensor(name)
                wide = widen(name, tensor, factor)
                changed += wide is not tensor
                tensors[name] = wide
    if not changed or changed % 3:
        raise ValueError(
            f"--widen: expected MLPs of gate_proj, up_proj and down_proj in {source}, found {changed} such weights"
        )
    out.mkdir()
    config["intermediate_size"] *= factor
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and ".safetensors" not in file.name:
            shutil.copy(file, out / file.name)


def widen(name: str, tensor: torch.Tensor, factor: int) -> torch.Tensor:
    """Widen one weight: repeat the rows of gate and up, add columns of zeros to down. Others are returned unchanged."""
    if name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
        return tensor.repeat(factor, 1)
    if name.endswith("mlp.down_proj.weight"):
        return torch.nn.functional.pad(tensor, (0, (factor - 1) * tensor.shape[1]))
    return tensor
