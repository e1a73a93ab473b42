"""Sizes of a target and its draft, and the time of a part of a step on an H100 by bytes, operations and launches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BANDWIDTH = 3.35e12 * 0.9  # bytes a second that an H100 SXM's memory gives
FLOPS = 989e12 * 0.7  # bf16 operations a second of a large product
NODE = 2.0e-6  # seconds from one kernel of a CUDA graph to the next, if each is short
BF16, FP8, FP32 = 2, 1, 4


@dataclass(frozen=True)
class Shape:
    """Of a target and its draft, on each of `gpus`."""

    name: str
    layers: int
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    vocab: int
    draft_vocab: int = 32000
    head_dim: int = 128
    gpus: int = 1

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return (attention + 3 * self.hidden * self.wide) // self.gpus

    @property
    def target(self) -> int:
        """Weights that a step of the target reads."""
        return self.layers * self.layer + self.vocab * self.hidden // self.gpus

    @property
    def fc(self) -> int:
        return 3 * self.hidden**2

    @property
    def qkv(self) -> int:
        """Of the draft, whose projections read the embedding and the state."""
        return 2 * self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads) // self.gpus

    @property
    def draft_layer(self) -> int:
        rest = self.hidden * self.head_dim * self.heads + 3 * self.hidden * self.wide
        return self.qkv + rest // self.gpus

    @property
    def head(self) -> int:
        return self.draft_vocab * self.hidden // self.gpus

    @property
    def kv_token(self) -> int:
        """Bytes of keys and values of a token in one layer."""
        return 2 * self.kv_heads * self.head_dim * BF16 // self.gpus


LLAMA_8B = Shape("Llama-3.1-8B, one H100", 32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = Shape("Llama-3.3-70B, four H100", 80, 8192, 28672, 64, 8, 128256, gpus=4)


@dataclass(frozen=True)
class Part:
    """A part of a step: bytes read and written, operations, and kernels in a CUDA graph."""

    bytes: float = 0.0
    flops: float = 0.0
    nodes: float = 0

    @property
    def seconds(self) -> float:
        return max(self.bytes / BANDWIDTH, self.flops / FLOPS, self.nodes * NODE)


def seconds(parts: Iterable[Part]) -> float:
    """Of parts that run one after another."""
    return sum(part.seconds for part in parts)


def product(weights: int, rows: int, width: int = BF16) -> Part:
    """A product of `rows` rows with weights that are read once."""
    return Part(weights * width, 2.0 * weights * rows, nodes=1)
