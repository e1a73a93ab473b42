"""A checkpoint on disk: config.json, safetensors or .bin, one file or many; read one tensor at a time."""

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_eagle3.checkpoint.config import DraftConfig, resolve_config
from vllm_eagle3.checkpoint.errors import CheckpointError
from vllm_eagle3.checkpoint.tensors import canonical_tensors

# (index file, single file, pattern), the first kind that is present is read: safetensors win over .bin.
KINDS = (
    ("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A draft on disk, with its config resolved. `tensors` reads and checks the rest."""

    path: Path
    config: DraftConfig
    files: tuple[Path, ...]
    file_of: Mapping[str, str]
    """Path of the file of each tensor, by its original name."""

    def tensors(self, notes: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Canonical (name, tensor) pairs, see `canonical_tensors`; what is found out goes to `notes`."""
        weights = ((name, tensor) for file in self.files for name, tensor in _read(file))
        yield from canonical_tensors(
            self.config, weights, source=str(self.path), file_of=self.file_of, notes=notes
        )


def read_checkpoint(
    path: str | Path, target: str | Path | Mapping[str, Any] | None = None, aux_layers: Any = None
) -> Checkpoint:
    """Open a draft.

    Args:
        path: its directory.
        target: directory or parsed config.json of the target, to check the draft against.
        aux_layers: three after-k ids that override the checkpoint's.

    Raises:
        CheckpointError: a file is missing, unreadable or contradicts another; what `resolve_config` refuses.
    """
    folder = Path(path)
    config = dict(_read_json(folder / "config.json"))
    quantisation = folder / "hf_quant_config.json"  # where ModelOpt puts it
    if quantisation.exists() and config.get("quantization_config") is None:
        config["quantization_config"] = _read_json(quantisation)
    if target is not None and not isinstance(target, Mapping):
        target = _read_json(Path(target) / "config.json")
    draft = resolve_config(
        config, source=str(folder / "config.json"), target_config=target, aux_layers=aux_layers
    )
    files = _weight_files(folder)
    file_of: dict[str, str] = {}
    for file in files:
        for name in _names(file):
            if name in file_of:
                raise CheckpointError(f"{file}: tensor {name} is also in {file_of[name]}")
            file_of[name] = str(file)
    return Checkpoint(folder, draft, tuple(files), file_of)


def _weight_files(folder: Path) -> list[Path]:
    for index_name, single_name, pattern in KINDS:
        index, single = folder / index_name, folder / single_name
        if index.exists():
            return _indexed_files(index)
        if single.exists():
            return [single]
        if files := sorted(folder.glob(pattern)):
            return files
    expected = ", ".join(f"{single} (or {index})" for index, single, _ in KINDS)
    raise CheckpointError(f"{folder}: no weights; expected {expected}")


def _indexed_files(index: Path) -> list[Path]:
    """The shards an index names; every tensor has to be where the index says."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise CheckpointError(f"{index}: weight_map: expected an object, found {weight_map!r}")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        listed = {name for name, where in weight_map.items() if where == file.name}
        present = set(_names(file))
        if listed != present:
            raise CheckpointError(
                f"{file}: contradicts {index.name}: missing {sorted(listed - present)}, "
                f"not in the index {sorted(present - listed)}"
            )
    return files


def _names(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return [name for name, _ in _read(file)]
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                yield name, handle.get_tensor(name)
        return
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file}: expected a state dict of plain tensors (read with weights_only=True): {error}"
        ) from error
    for name, tensor in state.items() if isinstance(state, Mapping) else [("", state)]:
        if not isinstance(tensor, Tensor) or not name:
            raise CheckpointError(
                f"{file}: expected a state dict of tensors, found {type(tensor).__name__} at {name!r}"
            )
        yield name, tensor


def _read_json(file: Path) -> Mapping[str, Any]:
    if not file.exists():
        raise CheckpointError(f"{file}: no such file; expected the directory of a checkpoint on this machine")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values
