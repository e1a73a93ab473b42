"""Typed access to config.json, with errors that name file, key, what was expected and what was found."""

from collections.abc import Mapping
from typing import Any

from vllm_eagle3.checkpoint.errors import CheckpointError

NUMBER = (int, float)
KINDS: dict[str, Any] = {
    "architectures": list,
    "layer_types": list,
    "eagle_config": Mapping,
    "speculators_config": Mapping,
    "transformer_layer_config": Mapping,
    "quantization_config": Mapping,
    "model_type": str,
    "hidden_act": str,
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
    "partial_rotary_factor": NUMBER,
}
KIND_NAMES = {list: "a list of strings", Mapping: "an object", str: "a string", NUMBER: "a number"}
LARGEST = 1 << 31
"""Far above every size of a real draft. A config that states more is damaged, and is refused before any allocation."""
MOST_POSITIONS = 1 << 24
"""vLLM makes a table of rotary embeddings with so many rows; the longest context of a known model is 10 million."""


def check_kinds(config: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError where a key holds the wrong kind of JSON value."""
    for key, value in config.items():
        if value is None or key not in KINDS:
            continue
        kind = KINDS[key]
        fits = isinstance(value, kind) and not (kind == NUMBER and isinstance(value, bool))
        if kind is list:
            fits = fits and all(isinstance(item, str) for item in value)
        if kind == NUMBER:
            fits = fits and abs(value) < float("inf")  # also refuses NaN, which compares as false
        if not fits:
            raise CheckpointError(f"{source}: {key}: expected {KIND_NAMES[kind]}, found {value!r:.200}")


class Reader:
    """Typed access to a JSON object, with errors that name file and key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{source}: expected a JSON object, found {type(values).__name__}")
        self.values, self.source = values, source

    def size(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        """An integer from 1 to `most`."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.source}: {key}: expected a positive integer, found {value!r:.200}")
        if value > most:
            raise CheckpointError(f"{self.source}: {key}: expected at most {most}, found {value}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.source}: {key}: expected true or false, found {value!r}")
        return value

    def mapping(self, key: str, required: bool = False) -> Mapping[str, Any]:
        value = self.values.get(key)
        if value is None and not required:
            return {}
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.source}: {key}: expected an object, found {value!r}")
        return value
