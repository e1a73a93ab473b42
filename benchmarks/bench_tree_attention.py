"""Attention of verification: a tree of 60 nodes, and FlashAttention on a chain of the same 61 rows.

`rows` is the number of requests. FlashAttention is called as in vLLM's backend, on the same paged cache. If it cannot
be imported, the JSON says so and has no ratio.

    python benchmarks/bench_tree_attention.py --out benchmarks/results/tree_attention_<device>.json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kernel_timing import (
    ModelShape,
    Options,
    Roofline,
    Variant,
    copies,
    measure_roofline,
    normal,
    parse,
    time_variants,
    write,
)
from torch import Tensor
from tqdm import tqdm

from vllm_eagle3.kernels import ancestor_bits, tree_attention

NODES, BLOCK_SIZE = 61, 16  # the root and 60 drafted nodes
CONTEXTS, DRY_CONTEXTS = (1024, 8192), (40,)
HEADS = {"tiny": 4, "SmolLM2-135M": 9, "Llama-3.1-8B": 32, "Qwen3-8B": 32, "Llama-3.3-70B": 64}
TARGET = 1.5  # the tree's time / FlashAttention's is to be at most this
MAX_SPLITS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph
Attention = Callable[[Tensor, Tensor], Tensor]  # query, cache -> output


@dataclass(frozen=True)
class Batch:
    """Requests with `context` tokens in the cache and NODES rows to verify, with the metadata of vLLM's backends."""

    context: int
    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    root: Tensor
    depth: Tensor
    tree_bits: Tensor
    chain_bits: Tensor

    @property
    def length(self) -> int:
        return self.context + NODES


def make_batch(rows: int, context: int, device: str) -> Batch:
    """Random trees, blocks scattered over the cache."""
    blocks = -(-(context + NODES) // BLOCK_SIZE)
    parents = torch.zeros(rows, NODES, dtype=torch.int64)
    for i in range(1, NODES):
        parents[:, i] = torch.randint(0, i, (rows,))
    depth, tree_bits = ancestor_bits(parents.to(device))
    chain = (torch.arange(NODES) - 1).clamp(min=0).repeat(rows, 1)
    int32 = {"dtype": torch.int32, "device": device}
    return Batch(
        context,
        torch.randperm(rows * blocks).view(rows, blocks).to(**int32),
        torch.arange(0, rows * NODES + 1, NODES, **int32),
        torch.full((rows,), context + NODES, **int32),
        torch.full((rows * NODES,), context, dtype=torch.int64, device=device),
        depth.flatten().long(),
        tree_bits.flatten(),
        ancestor_bits(chain.to(device))[1].flatten(),
    )


def ours(batch: Batch, bits: Tensor, scale: float) -> Attention:
    """This project's kernel, or its twin on a CPU."""
    positions = batch.root + batch.depth
    return lambda query, cache: tree_attention(
        query, cache, batch.block_table, batch.query_start_loc, batch.seq_lens, batch.root, bits,
        positions, max_query_len=NODES, scale=scale,
    )  # fmt: skip


def flash(batch: Batch, model: ModelShape, options: Options, scale: float) -> Attention | str:
    """FlashAttention on a chain, or the reason why it cannot run here.

    FA3's schedule is not timed, because vLLM's backend makes it once per step under CUDA graphs, not in each layer.
    """
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError as error:
        return f"FlashAttention: {error}"
    version = get_flash_attn_version(head_size=model.head_dim)
    if version is None:
        return "FlashAttention: no version of it runs on this device"
    rows = len(batch.seq_lens)
    splits, schedule = 0, None
    if version == 3:
        splits = MAX_SPLITS
        schedule = get_scheduler_metadata(
            batch_size=rows,
            max_seqlen_q=NODES,
            max_seqlen_k=batch.length,
            num_heads_q=HEADS[model.name],
            num_heads_kv=model.kv_heads,
            headdim=model.head_dim,
            cache_seqlens=batch.seq_lens,
            qkv_dtype=options.dtype,
            cu_seqlens_q=batch.query_start_loc,
            page_size=BLOCK_SIZE,
            causal=True,
            num_splits=splits,
        )

    def attend(query: Tensor, cache: Tensor) -> Tensor:
        keys, values = cache.transpose(1, 2).split(model.head_dim, dim=-1)
        return flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=torch.empty_like(query),
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=NODES,
            seqused_k=batch.seq_lens,
            max_seqlen_k=batch.length,
            softmax_scale=scale,
            causal=True,
            block_table=batch.block_table,
            scheduler_metadata=schedule,
            num_splits=splits,
            fa_version=version,
        )

    return attend


def bench(model: ModelShape, rows: int, context: int, options: Options, roofline: Roofline) -> dict[str, Any]:
    """Times of one model, batch size and context, and their ratio."""
    batch = make_batch(rows, context, options.device)
    heads, width = HEADS[model.name], 2 * model.head_dim
    blocks = batch.block_table.numel()
    size = blocks * BLOCK_SIZE * model.kv_heads * width * options.dtype.itemsize
    count = copies(options.device, size)
    # [blocks, kv_heads, block_size, 2 * head_dim] as vLLM lays it out: a token's heads are adjacent.
    caches = [
        normal(blocks, BLOCK_SIZE, model.kv_heads, width, like=options).transpose(1, 2) for _ in range(count)
    ]
    query = normal(rows * NODES, heads, model.head_dim, like=options)
    scale = model.head_dim**-0.5
    tree = ours(batch, batch.tree_bits, scale)
    variants: dict[str, Variant] = {"tree": lambda i: tree(query, caches[i])}
    chain = flash(batch, model, options, scale)
    result: dict[str, Any] = {"model": model.name, "rows": rows, "context": context}
    if isinstance(chain, str):
        result |= {"flash": chain}
    else:
        variants["flash chain"] = lambda i: chain(query, caches[i])
        same = ours(batch, batch.chain_bits, scale)(query, caches[0])
        difference = (same.float() - chain(query, caches[0]).float()).abs().max()
        result |= {"largest_difference_on_a_chain": float(difference)}
    times = time_variants(variants, count, options)
    ratio = times["tree"]["median"] / times["flash chain"]["median"] if "flash chain" in times else None
    moved = rows * batch.length * model.kv_heads * width * options.dtype.itemsize
    flops = 4 * rows * NODES * heads * model.head_dim * batch.length
    return result | {
        "us": times,
        "roofline_us": roofline.microseconds(moved, flops),
        "ratio": ratio and round(ratio, 3),
        "target": TARGET,
        "met": None if ratio is None else ratio <= TARGET,
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__ or "", argv, rows=(1, 8))
    roofline = measure_roofline(options)
    contexts = DRY_CONTEXTS if options.dry_run else CONTEXTS
    cases = [(model, rows, c) for model in options.models for rows in options.rows for c in contexts]
    results = [bench(*case, options, roofline) for case in tqdm(cases, disable=options.dry_run)]
    write(results, roofline, options, f"random trees of {NODES} rows; ratio: tree / FlashAttention")


if __name__ == "__main__":
    main()
