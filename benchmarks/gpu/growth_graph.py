"""The growth of a draft tree in one CUDA graph, without vLLM: torch, Triton and this project's kernels only.

A decoder layer with random weights of an 8B model's shape grows a tree over a paged cache, eagerly and from a captured
graph, on the same inputs. The trees must be equal, also after the inputs have changed, and both are timed. Without a
GPU (`--dry-run`) the growth runs twice on the kernels' torch twins, so that the script itself is tested.

    python benchmarks/gpu/growth_graph.py --out benchmarks/results/growth_graph_<device>.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_eagle3.kernels import TreeGrowth, head_topk, path_attention
from vllm_eagle3.provenance import provenance
from vllm_eagle3.tree.growth import Growth as TorchGrowth

DEPTH, TOPK, NODES, BLOCK = 6, 10, 60, 16
REPEATS = 30


@dataclass(frozen=True)
class Shape:
    """Sizes of the draft: hidden and MLP width, heads, head size, vocabularies of the drafts and of the embedding."""

    hidden: int
    wide: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


LLAMA_8B = Shape(4096, 14336, 32, 8, 128, 32000)
TINY = Shape(64, 128, 4, 2, 16, 256)


class Growth:
    """One draft layer, its paged cache, and buffers whose addresses do not change, as a graph needs."""

    def __init__(self, shape: Shape, batch: int, context: int, device: str, dtype: torch.dtype) -> None:
        self.shape, self.batch = shape, batch
        h, heads, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        make = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=make, device=device, dtype=dtype) / size[-1] ** 0.5

        self.embed, self.head = random(shape.vocab, h), random(shape.vocab, h)
        self.qkv, self.out = random(heads + 2 * kv, 2 * h), random(h, heads)
        self.gate_up, self.down = random(2 * shape.wide, h), random(h, shape.wide)
        blocks = -(-context // BLOCK)
        self.cache = random(batch * blocks, shape.kv_heads, BLOCK, 2 * shape.head_dim)
        self.table = torch.randperm(batch * blocks, generator=make, device=device).view(batch, blocks).int()
        self.lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.states = random(batch, 1, h)
        self.root_log_probs = torch.zeros(batch, 1, TOPK, device=device)
        self.root_ids = torch.zeros(batch, 1, TOPK, dtype=torch.int64, device=device)
        scratch = (batch, (DEPTH - 1) * TOPK, shape.kv_heads, shape.head_dim)
        self.keys, self.values = (torch.zeros(scratch, dtype=dtype, device=device) for _ in "kv")
        self.tokens, self.parents = (
            torch.zeros(batch, NODES, dtype=torch.int64, device=device) for _ in "tp"
        )
        self.chain = torch.zeros(batch, dtype=torch.bool, device=device)

    def new_inputs(self, seed: int) -> None:
        """Write other states, children and lengths to the same addresses."""
        make = torch.Generator(self.states.device).manual_seed(seed)
        self.states.copy_(torch.randn(self.states.shape, generator=make, device=self.states.device))
        log_probs, ids = self.children(self.states.flatten(0, 1))
        self.root_log_probs.copy_(log_probs.view(self.root_log_probs.shape))
        self.root_ids.copy_(ids.view(self.root_ids.shape))
        self.lens.sub_(1)

    def children(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The TOPK likeliest tokens after each state [n, hidden]: log-probabilities and ids [n, TOPK]."""
        top = head_topk(torch.nn.functional.rms_norm(states, states.shape[-1:]), self.head, TOPK)
        return top.logits - top.lse[:, None], top.ids

    def layer(self, ids: Tensor, states: Tensor, paths: Tensor) -> Tensor:
        """The next states [batch, TOPK, hidden] of the nodes of a level."""
        shape, (_, nodes, level) = self.shape, paths.shape
        both = torch.cat([self.embed[ids], torch.nn.functional.rms_norm(states, states.shape[-1:])], dim=-1)
        sizes = [n * shape.head_dim for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        query, key, value = (both @ self.qkv.T).split(sizes, dim=-1)
        slots = slice((level - 1) * nodes, level * nodes)
        self.keys[:, slots] = key.unflatten(-1, (shape.kv_heads, -1))
        self.values[:, slots] = value.unflatten(-1, (shape.kv_heads, -1))
        context = path_attention(
            query.contiguous().unflatten(-1, (shape.heads, -1)), self.cache, self.table, self.lens, self.keys,
            self.values, paths, scale=shape.head_dim**-0.5,
        )  # fmt: skip
        states = states + context.flatten(2) @ self.out.T
        gate, up = (torch.nn.functional.rms_norm(states, states.shape[-1:]) @ self.gate_up.T).chunk(2, dim=-1)
        return states + (torch.nn.functional.silu(gate) * up) @ self.down.T

    def grow(self, in_torch: bool = False) -> None:
        """Write a tree for each request to `tokens` and `parents`, without waiting for the device.

        in_torch: by torch's operations, as on any device; otherwise, on a GPU, by the kernels of `TreeGrowth`.
        """
        kind = TreeGrowth if self.states.is_cuda and not in_torch else TorchGrowth
        trees = kind(DEPTH, TOPK, self.chain, self.lens.long() - 1, 1 << 20, torch.int64)
        children = self.root_log_probs, self.root_ids, self.states
        level = trees.extend(*(tensor.flatten(0, 1) for tensor in children))
        for _ in range(1, DEPTH):
            shape = (self.batch, TOPK)
            states = self.layer(level.tokens.view(shape), level.states.view(*shape, -1), level.paths)
            states = states.flatten(0, 1)
            level = trees.extend(*self.children(states), states)
        trees.rerank(self.tokens, self.parents)


def captured(growth: Growth) -> Callable[[], None]:
    """A function that replays the growth from a CUDA graph, or runs it eagerly if there is no GPU."""
    if not torch.cuda.is_available():
        return growth.grow
    for _ in range(3):  # compiles the kernels
        growth.grow()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        growth.grow()
    return graph.replay


def milliseconds(call: Callable[[], None], repeats: int) -> float:
    """Median time of a call, with the time of the host."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(shape: Shape, batch: int, context: int, repeats: int) -> dict[str, object]:
    """One row of the results. Raises RuntimeError if the graph's tree differs from the eager run's."""
    on_gpu = torch.cuda.is_available()
    growth = Growth(
        shape, batch, context, "cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32
    )
    growth.new_inputs(1)
    replay = captured(growth)
    for seed in (2, 3):
        growth.new_inputs(seed)
        growth.grow(in_torch=True)
        expected = growth.tokens.clone(), growth.parents.clone()
        growth.tokens.zero_()
        growth.parents.zero_()
        replay()
        if not (torch.equal(growth.tokens, expected[0]) and torch.equal(growth.parents, expected[1])):
            raise RuntimeError(
                f"batch {batch}, context {context}: the graph grew another tree than the eager run"
            )
    eager, graph = milliseconds(growth.grow, repeats), milliseconds(replay, repeats)
    return {"batch": batch, "context": context, "same_trees": True, "ms_eager": eager, "ms_graph": graph}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny shape; needs no GPU")
    args = parser.parse_args(argv)
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("found no GPU: expected one, or --dry-run")
    shape, sizes = (
        (TINY, [(2, 40)]) if args.dry_run else (LLAMA_8B, [(1, 1024), (8, 1024), (8, 8192), (32, 1024)])
    )
    results = [measure(shape, batch, context, 2 if args.dry_run else REPEATS) for batch, context in sizes]
    made = provenance(
        [], {"depth": DEPTH, "topk": TOPK, "nodes": NODES, "shape": vars(shape), "weights": "random"}
    )
    args.out.write_text(
        json.dumps({"provenance": made, "results": results}, indent=1) + "\n", encoding="utf-8"
    )
    for row in results:
        print(
            f"batch {row['batch']}, context {row['context']}: same trees, "
            f"{row['ms_eager']:.2f} ms eager, {row['ms_graph']:.2f} ms from the graph"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
