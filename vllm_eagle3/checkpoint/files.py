"""A checkpoint on disk: config.json, and weights as safetensors or .bin in one or more files.

Tensors are read one at a time."""

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_eagle3.checkpoint.config import DraftConfig, resolve_config
from vllm_eagle3.checkpoint.errors import CheckpointError
from vllm_eagle3.checkpoint.tensors import canonical_tensors, refuse_another_model

# (index file, single file, pattern). The first kind that is present is read, so safetensors win over .bin.
KINDS = (
    ("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
)

LARGEST_JSON = 1 << 26  # bytes; the index of the largest models has a few megabytes


@dataclass(frozen=True)
class Checkpoint:
    """A draft on disk, with its config resolved. `tensors` reads and checks the rest."""

    path: Path
    config: DraftConfig
    files: tuple[Path, ...]
    file_of: Mapping[str, str]
    """Path of the file of each tensor, by its original name."""

    def tensors(self, notes: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Canonical (name, tensor) pairs, see `canonical_tensors`. Adds what it finds out to `notes`."""
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
        aux_layers: after-k ids that override the checkpoint's.

    Raises:
        CheckpointError: a file is missing, unreadable or contradicts another, or `resolve_config` refuses the draft.
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


def check_draft(
    path: str | Path, target: Mapping[str, Any] | None = None, aux_layers: Any = None
) -> DraftConfig:
    """Check the whole draft with its weights before anything is built from it. Takes as long as reading the files.

    The arguments are those of `read_checkpoint`. A draft that vLLM's own EAGLE-3 serves is checked only as far as
    this package understands it.

    Raises:
        CheckpointError: `read_checkpoint` or `canonical_tensors` refuses the draft; the folder holds a language model
            instead of a draft; the tensors contradict the number of layers in config.json.
    """
    checkpoint = read_checkpoint(path, target, aux_layers)
    refuse_another_model(checkpoint.config, checkpoint.file_of, str(checkpoint.path))
    if not checkpoint.config.unsupported_reason:
        for _ in checkpoint.tensors():
            pass
    return checkpoint.config


def refuse_unreadable(path: str | Path, error: Exception) -> NoReturn:
    """Raise CheckpointError for a loader's `error`. Reads the files again to name the one at fault."""
    if Path(path).is_dir():
        for file in _weight_files(Path(path)):
            for _ in _read(file):
                pass
    raise CheckpointError(f"{path}: the weights cannot be loaded: {error}") from error


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
    """The shards that an index names. Each tensor must be in the file that the index says."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise CheckpointError(f"{index}: weight_map: expected an object, found {weight_map!r}")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map: expected names of files, found other values")
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
    with _opened(file) as handle:
        return list(handle.keys())


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                yield name, handle.get_tensor(name)
        return
    for name, tensor in _unpickled(file).items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str) or not name:
            raise CheckpointError(
                f"{file}: expected a state dict of tensors, found {type(tensor).__name__} at {name!r:.200}"
            )
        yield name, tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    _check_is_file(file)
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error


def _unpickled(file: Path) -> Mapping[Any, Any]:
    """The state dict in a .bin file. It must hold plain tensors and be no larger than the file."""
    _check_is_file(file)
    try:
        zipped = is_zipfile(file)
        if zipped and (packed := [part.filename for part in ZipFile(file).infolist() if part.compress_type]):
            raise CheckpointError(
                f"{file}: expected tensors as torch stores them, uncompressed; {packed[0]} is compressed"
            )
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{file}: expected a state dict of plain tensors (read with weights_only=True): {text[0]}"
        ) from error
    return state if isinstance(state, Mapping) else {"": state}


def _read_json(file: Path) -> Mapping[str, Any]:
    _check_is_file(file, "; expected the directory of a checkpoint on this machine")
    try:
        if (size := file.stat().st_size) > LARGEST_JSON:
            raise CheckpointError(f"{file}: expected at most {LARGEST_JSON} bytes of JSON, found {size}")
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def _check_is_file(file: Path, hint: str = "") -> None:
    """Raise CheckpointError for a missing file and for pipes or devices, because reading them might never end."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError as error:
        link = f" ({file.name} is a link to what does not exist)" if file.is_symlink() else ""
        raise CheckpointError(f"{file}: no such file{link}{hint}") from error
    except (
        OSError
    ) as error:  # a circle of links, a folder that may not be entered, a file where a folder should be
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{file}: expected a file, found something else")
