"""The modes of an evaluation, and the settings that they share."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vllm_eagle3.config import DRAFT_SAMPLING, Eagle3Options, GraftOptions, TreeOptions
from vllm_eagle3.prompts import Prompt, load_prompts

MODES = {
    "none": "vLLM without speculation",
    "native": "vLLM's own eagle3",
    "chain": "this project's chain in vLLM",
    "tree": "this project's tree in vLLM",
    "chain+graft": "this project's chain in vLLM, with a graft (tokens copied from earlier in the text)",
    "tree+graft": "this project's tree in vLLM, with a graft",
    "reference-chain": "the chain in plain transformers",
    "reference-tree": "EAGLE-2's tree in plain transformers",
    "reference-chain+graft": "the chain in plain transformers, with a graft",
    "reference-tree+graft": "the tree in plain transformers, with a graft",
}
MOST_NODES, MOST_DEPTH = 62, 16  # of a tree without its root, as TreeOptions
GRAFT = "+graft"  # suffix of modes with grafts


def as_tree(mode: str) -> bool:
    """Whether vLLM drafts trees in this mode: a chain with a graft is one."""
    return mode == "tree" or mode.endswith(GRAFT)


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)


@dataclass(frozen=True)
class EvalSettings:
    """Settings of one evaluation. Raises ValueError, which names the option with a bad value."""

    target: str
    draft: str
    data: tuple[str, ...]
    modes: tuple[str, ...] = ("none", "native", "chain")
    num_speculative_tokens: int = 5
    tree: TreeOptions = TreeOptions()
    graft: GraftOptions = GraftOptions()
    temperature: float = 0.0
    draft_sampling: str = Eagle3Options.draft_sampling
    batch_size: int = 1
    max_tokens: int = 256
    limit: int | None = None
    dtype: Dtype = "auto"
    max_model_len: int = 4096
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"--modes: expected each at most once of {', '.join(MODES)}, found {self.modes}")
        for mode in self.modes:
            if mode.removesuffix(GRAFT) not in self.modes:
                raise ValueError(f"--modes: {mode} needs {mode.removesuffix(GRAFT)} as well, to compare with")
        for name in ("num_speculative_tokens", "batch_size", "max_tokens", "max_model_len", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
        grafted = any(mode.endswith(f"chain{GRAFT}") for mode in self.modes)
        if grafted and self.num_speculative_tokens > MOST_DEPTH:
            raise ValueError(
                f"--num-speculative-tokens: expected at most {MOST_DEPTH} with chain{GRAFT}, which is a tree, "
                f"found {self.num_speculative_tokens}"
            )
        if self.temperature < 0:
            raise ValueError(f"--temperature: expected at least 0, found {self.temperature}")
        if self.draft_sampling not in DRAFT_SAMPLING:
            raise ValueError(
                f"--draft-sampling: expected {' or '.join(DRAFT_SAMPLING)}, found {self.draft_sampling}"
            )
        for path in self.data:
            if not Path(path).is_file():
                raise ValueError(f"--data: expected a file of prompts, found none at {path}")

    def shape(self, mode: str) -> TreeOptions:
        """The draft of a mode as a tree, without its graft: a chain expands one node a level."""
        if mode.removesuffix(GRAFT).endswith("tree"):
            return self.tree
        length = self.num_speculative_tokens
        return TreeOptions(depth=length, topk=1, nodes=length)

    def places(self, mode: str) -> int:
        """Most nodes that a mode drafts: a graft has places of its own, as far as a tree can have so many."""
        is_tree = mode.removesuffix(GRAFT).endswith("tree")
        nodes = self.tree.nodes if is_tree else self.num_speculative_tokens
        return min(nodes + self.graft.length, MOST_NODES) if mode.endswith(GRAFT) else nodes

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EvalSettings:
        fields = json.loads(text)
        fields |= {"tree": TreeOptions(**fields["tree"]), "graft": GraftOptions(**fields["graft"])}
        return cls(**fields | {name: tuple(fields[name]) for name in ("data", "modes")})

    def public(self) -> dict[str, Any]:
        """The settings for the provenance of a result: names of files and models without their folders."""
        fields = dataclasses.asdict(self)
        names = {name: Path(fields[name]).name for name in ("target", "draft")}
        return fields | names | {"data": [Path(path).name for path in self.data], "modes": list(self.modes)}


def load_tasks(settings: EvalSettings) -> dict[str, list[Prompt]]:
    """Prompts by task, at most `limit` of each file.

    Raises:
        ValueError: a file holds no prompts, or two prompts have the same id.
    """
    found: dict[str, list[Prompt]] = {}
    ids: set[str] = set()
    for path in settings.data:
        for prompt in load_prompts(path)[: settings.limit]:
            if prompt.id in ids:
                raise ValueError(f"{path}: a second prompt with id {prompt.id!r}")
            ids.add(prompt.id)
            found.setdefault(prompt.source, []).append(prompt)
    return found
