"""Options of the plugin: `--additional-config '{"eagle3": {...}}'` -> `Eagle3Options`.

Each option is described once, in the metadata of its field. `options_table` prints these as the README's table.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "eagle3"
POLICIES = ("auto", "fixed")
DRAFT_SAMPLING = ("auto", "greedy")


def _option(default: Any, kind: str, valid: str, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "valid": valid, "help": text})


@dataclass(frozen=True)
class TreeOptions:
    """Shape of a draft tree. Raises ValueError on a value out of range."""

    depth: int = _option(
        6, "int", "1 to 16", "Draft steps, which is the longest path of the tree without its root."
    )
    topk: int = _option(10, "int", "1 to 32", "Children of an expanded node, and nodes expanded per step.")
    nodes: int = _option(
        60, "int", "1 to 62", "Nodes that are kept after reranking and verified, without the root."
    )

    def __post_init__(self) -> None:
        for name, low, high in (("depth", 1, 16), ("topk", 1, 32), ("nodes", 1, 62)):
            value = getattr(self, name)
            if not _is_int(value) or not low <= value <= high:
                raise _bad(f"tree.{name}", value, f"an integer from {low} to {high}")


@dataclass(frozen=True)
class GraftOptions:
    """How a graft is looked up. Raises ValueError on a value out of range."""

    length: int = _option(8, "int", "1 to 32", "The most tokens that are copied, and so the most nodes.")
    min_match: int = _option(
        2, "int", "1 to 8", "How many of the newest tokens must occur earlier in the text."
    )

    def __post_init__(self) -> None:
        for name, low, high in (("length", 1, 32), ("min_match", 1, 8)):
            value = getattr(self, name)
            if not _is_int(value) or not low <= value <= high:
                raise _bad(f"graft.{name}", value, f"an integer from {low} to {high}")


@dataclass(frozen=True)
class Eagle3Options:
    """The plugin's options. Raises ValueError, which names the option with a bad value."""

    aux_layers: tuple[int, ...] | None = _option(
        None,
        "[int, ...]",
        "strictly increasing ids from 0 to the target's number of layers, as many as the draft's fc joins (usually 3)",
        "The target's layers that the draft reads, instead of the checkpoint's. Id k is the state after k layers (0: "
        "the embedding), as in vLLM.",
    )
    tree: TreeOptions | None = _option(
        None,
        "object or bool",
        "null or false (chains), true (the defaults below), or an object with the keys below",
        "Also draft trees. With policy auto this is the largest tree of a step: the policy chooses smaller trees, "
        "chains or no drafts where these are faster. true also sets num_speculative_tokens to the tree's nodes.",
    )
    graft: GraftOptions | bool = _option(
        True,
        "bool or object",
        "true, false or an object with the keys below",
        "With trees: if the newest tokens of a request occurred before in its prompt or answer, the tokens that "
        "followed them there become a branch of its tree, in place of the least likely nodes. "
        "`num_speculative_tokens` above `tree.nodes` makes room for both.",
    )
    policy: str = _option(
        "auto",
        "str",
        " or ".join(f'"{policy}"' for policy in POLICIES),
        '"auto" chooses 0 to num_speculative_tokens drafts per step (of a tree: its best nodes) to maximise '
        'throughput; "fixed" drafts all of them in every step.',
    )
    draft_sampling: str = _option(
        "greedy",
        "str",
        " or ".join(f'"{way}"' for way in DRAFT_SAMPLING),
        '"auto" draws drafts from the draft\'s distribution for requests that sample, so that more of them are '
        'accepted (in trees on a CPU only, and without a seed); "greedy" always takes the likeliest tokens. For '
        "chains, `draft_sample_method` in the speculative config has priority. Outputs have the same distribution "
        "either way.",
    )
    fused_kernels: bool = _option(
        True, "bool", "true or false", "Use the fused kernels. false runs their plain PyTorch twins."
    )
    int8_draft: bool = _option(
        True,
        "bool",
        "true or false",
        "On a CPU, compute a bf16 draft (not the target) in int8. Outputs do not depend on it.",
    )
    fp8_draft: bool = _option(
        False,
        "bool",
        "true or false",
        "On a GPU of compute capability 8.9 or more, read the draft's weights in fp8 in steps of at most 64 rows. They "
        "take half of their memory more. Outputs do not depend on it.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.aux_layers, list):  # JSON has no tuples
            object.__setattr__(self, "aux_layers", tuple(self.aux_layers))
        if isinstance(self.tree, bool):
            object.__setattr__(self, "tree", TreeOptions() if self.tree else None)
        if isinstance(self.tree, Mapping):
            object.__setattr__(self, "tree", _from_mapping(TreeOptions, self.tree, "tree."))
        if self.aux_layers is not None and not _are_layer_ids(self.aux_layers):
            raise _bad("aux_layers", self.aux_layers, "null or strictly increasing ids from 0")
        if not (self.tree is None or isinstance(self.tree, TreeOptions)):
            raise _bad(
                "tree",
                self.tree,
                f"true, false, null or an object with the keys {', '.join(_names(TreeOptions))}",
            )
        if isinstance(self.graft, Mapping):
            object.__setattr__(self, "graft", _from_mapping(GraftOptions, self.graft, "graft."))
            if self.tree is None:
                raise _bad("graft", self.graft, "the option 'tree' with it, because a chain has no branches")
        if not isinstance(self.graft, bool | GraftOptions):
            raise _bad(
                "graft",
                self.graft,
                f"true, false or an object with the keys {', '.join(_names(GraftOptions))}",
            )
        if self.policy not in POLICIES:
            raise _bad("policy", self.policy, " or ".join(map(repr, POLICIES)))
        if self.draft_sampling not in DRAFT_SAMPLING:
            raise _bad("draft_sampling", self.draft_sampling, " or ".join(map(repr, DRAFT_SAMPLING)))
        for name in ("fused_kernels", "int8_draft", "fp8_draft"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "true or false")

    @property
    def grafts(self) -> GraftOptions | None:
        """What trees are grafted with; None for nothing."""
        if self.tree is None or self.graft is False:
            return None
        return GraftOptions() if self.graft is True else self.graft

    @property
    def deepest(self) -> int:
        """Most tokens that a verification of trees can accept: the depth of the draft, or that of a longer graft."""
        assert self.tree is not None
        return max(self.tree.depth, self.grafts.length if self.grafts else 0)

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> Eagle3Options:
        """Read the options under the key "eagle3" of vLLM's `additional_config`. Other keys are ignored.

        Raises:
            ValueError: a key is unknown or a value is bad. The message names the key, what was found and what is
                valid.
        """
        options = (additional_config or {}).get(KEY)
        return _from_mapping(cls, {} if options is None else options, "")


def cache_folder() -> Path:
    """`vllm-eagle3/` under XDG_CACHE_HOME, or under ~/.cache if that is not set.

    Raises RuntimeError if there is no home directory either.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vllm-eagle3"


def options_table() -> str:
    """The options as a Markdown table, for the README."""
    rows = ["| option | type | default | valid | meaning |", "| --- | --- | --- | --- | --- |"]
    for prefix, cls in (("", Eagle3Options), ("tree.", TreeOptions), ("graft.", GraftOptions)):
        for field in dataclasses.fields(cls):
            cells = (f"`{prefix}{field.name}`", field.metadata["kind"], f"`{json.dumps(field.default)}`")
            rows.append(f"| {' | '.join(cells)} | {field.metadata['valid']} | {field.metadata['help']} |")
    return "\n".join(rows) + "\n"


def _from_mapping(cls: type[Any], options: Any, prefix: str) -> Any:
    if not isinstance(options, Mapping):
        raise _bad(prefix.rstrip("."), options, f"an object with the keys {', '.join(_names(cls))}")
    for key in options:
        if key not in _names(cls):
            where = f"{KEY}.{prefix}{key}"
            raise ValueError(f"additional_config: unknown option {where!r}; valid: {', '.join(_names(cls))}")
    return cls(**options)


def _bad(name: str, found: object, expected: str) -> ValueError:
    option = f"{KEY}.{name}" if name else KEY
    return ValueError(f"additional_config: option {option!r}: expected {expected}, found {found!r}")


def _names(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_layer_ids(ids: object) -> bool:
    if not (isinstance(ids, tuple) and ids and all(_is_int(i) for i in ids)):
        return False
    return ids[0] >= 0 and all(low < high for low, high in zip(ids, ids[1:], strict=False))
