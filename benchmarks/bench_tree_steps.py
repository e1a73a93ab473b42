"""Tree steps on the device: ancestor masks, verification walk and KV commit, with their plain-torch twins.

vLLM has no trees, so there is nothing else to compare with. `rows` is the number of requests, each with 61 nodes.

    python benchmarks/bench_tree_steps.py --out benchmarks/results/tree_steps_<device>.json
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from kernel_timing import ModelShape, Options, Roofline, Variant, normal, run, time_variants

from vllm_eagle3.kernels import ancestor_bits, commit_kv, kv_table, tree_walk

NODES, PATH, BLOCK_SIZE = 61, 7, 16


def bench(model: ModelShape, rows: int, options: Options, roofline: Roofline) -> dict[str, Any]:
    """Times of the kernels (CUDA) and their twins at one number of requests. Each request moves PATH - 1 rows."""
    parents = torch.zeros(rows, NODES, dtype=torch.int64)
    for i in range(1, NODES):
        parents[:, i] = torch.randint(0, i, (rows,))
    tokens, sampled = (torch.randint(0, 2, (rows, NODES), device=options.device) for _ in range(2))
    parents = parents.to(options.device)
    blocks = rows * -(-NODES // BLOCK_SIZE)
    shape = (blocks, 2, BLOCK_SIZE, model.kv_heads, model.head_dim)
    table = kv_table([normal(*shape, like=options) for _ in range(model.layers)])
    first = torch.arange(rows, device=options.device)[:, None] * (blocks // rows * BLOCK_SIZE)
    dst = first + torch.arange(PATH, device=options.device)
    src = first + torch.arange(PATH, device=options.device) * 3
    variants: dict[str, Variant] = {}
    backends: dict[str, Any] = {"torch": "torch"}
    if torch.device(options.device).type == "cuda":
        backends = {"triton": "triton", "torch": "torch"}
    for name, backend in backends.items():
        variants[f"ancestor_bits {name}"] = lambda i, b=backend: ancestor_bits(parents, backend=b)
        variants[f"tree_walk {name}"] = lambda i, b=backend: tree_walk(parents, tokens, sampled, backend=b)
        if name == "triton" or torch.device(options.device).type == "cpu":
            variants[f"commit_kv {name}"] = lambda i, b=backend: commit_kv(table, src, dst, backend=b)
    moved = rows * (PATH - 1) * model.layers * 2 * model.kv_heads * model.head_dim * options.dtype.itemsize
    return {
        "model": model.name,
        "rows": rows,
        "us": time_variants(variants, 1, options),
        "roofline_us": roofline.microseconds(2 * moved, 0),
    }


def main(argv: Sequence[str] | None = None) -> None:
    run(
        bench,
        __doc__,
        f"random trees of {NODES} nodes; roofline of the KV commit alone",
        argv,
        rows=(1, 4, 8, 32, 64),
    )


if __name__ == "__main__":
    main()
