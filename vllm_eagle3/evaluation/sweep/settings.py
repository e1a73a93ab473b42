"""The modes and the settings of a throughput sweep."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_eagle3.config import TreeOptions
from vllm_eagle3.evaluation.model_shapes import SHAPES
from vllm_eagle3.evaluation.settings import DTYPES, Dtype

MODES = {
    "none": "vLLM without speculation",
    "native": "vLLM's own eagle3, at the best of --native-tokens",
    "adaptive": "vLLM's own eagle3 with adaptive verification (V2 runner with full CUDA graphs)",
    "chain": "this project's chain of --num-speculative-tokens",
    "tree": "this project's tree",
    "auto": "this project with policy auto, chains of up to --num-speculative-tokens",
    "auto-tree": "this project with policy auto, trees up to --tree where they pay",
}
TREES = {"tree", "auto-tree"}
PAPER = {
    2: 1.75,
    4: 1.68,
    8: 1.58,
    16: 1.49,
    24: 1.42,
    32: 1.36,
    48: 1.21,
    56: 1.01,
}  # arXiv 2503.01840, table 3
# The share of steps in which the n-th draft is accepted, from the acceptance lengths of EAGLE-3 for Llama-3.1-8B on
# MT-bench in vllm-project/vllm#20780. How the first two share their sum is an assumption.
PUBLISHED_RATES = (0.78, 0.58, 0.43, 0.29, 0.24, 0.14, 0.08)


@dataclass(frozen=True)
class SweepSettings:
    """Settings of one sweep. Raises ValueError, which names the option with a bad value."""

    target: str
    draft: str
    data: tuple[str, ...]
    batch_sizes: tuple[int, ...] = tuple(PAPER)
    modes: tuple[str, ...] = ("none", "native", "chain", "auto")
    num_speculative_tokens: int = 5
    native_tokens: tuple[int, ...] = (1, 2, 3, 5)
    tree: TreeOptions = TreeOptions()
    temperature: float = 0.0
    repeats: int = 7
    max_tokens: int = 128
    max_model_len: int = 1024
    dtype: Dtype = "auto"
    enforce_eager: bool = False
    shape: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the plugin, beside those that a mode sets
    acceptance_rates: tuple[float, ...] = PUBLISHED_RATES  # with a shape; if empty, random weights decide

    def __post_init__(self) -> None:
        for name, known in (("modes", tuple(MODES)), ("dtype", DTYPES)):
            values = getattr(self, name)
            for value in (values,) if isinstance(values, str) else values:
                _expect(value in known, name, f"one of {', '.join(known)}", value)
        _expect(len(set(self.modes)) == len(self.modes) > 0, "modes", "each mode at most once", self.modes)
        for name in ("repeats", "max_tokens", "max_model_len", "num_speculative_tokens"):
            _expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("batch_sizes", "native_tokens"):
            values = getattr(self, name)
            _expect(values and min(values) >= 1, name, "numbers of at least 1", values)
        for path in self.data:
            _expect(Path(path).is_file(), "data", "a file of prompts", path)
        if self.shape is not None:
            _expect(self.shape in SHAPES, "shape", f"one of {', '.join(SHAPES)}", self.shape)
            _expect(
                not TREES & set(self.modes),
                "modes",
                "no trees: synthetic acceptance knows chains only",
                TREES,
            )
            longest = max(self.num_speculative_tokens, *self.native_tokens)
            rates = self.acceptance_rates
            _expect(
                not rates or len(rates) >= longest,
                "acceptance_rates",
                f"a rate for each of {longest} drafts",
                rates,
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SweepSettings:
        fields: dict[str, Any] = json.loads(text)
        fields |= {"tree": TreeOptions(**fields["tree"])}
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**fields | lists)

    def public(self) -> dict[str, Any]:
        """The settings for the provenance of a result: names of files and models without their folders."""
        fields = dataclasses.asdict(self)
        names = {name: Path(fields[name]).name for name in ("target", "draft")}
        return fields | names | {"data": [Path(path).name for path in self.data]}

    def runs(self) -> list[tuple[str, str, int]]:
        """(name, mode, drafts per step) of each engine. "native" is one engine for each of `native_tokens`."""
        found: list[tuple[str, str, int]] = []
        for mode in self.modes:
            if mode == "native":
                found += [(f"native-{k}", mode, k) for k in self.native_tokens]
            elif mode in TREES:
                found.append((mode, mode, self.tree.nodes))
            else:
                found.append((mode, mode, 0 if mode == "none" else self.num_speculative_tokens))
        return found


def _expect(condition: object, name: str, expected: str, found: object) -> None:
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, found {found!r}")
