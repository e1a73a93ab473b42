"""Tree attention of one layer on a CPU: this project's C++ kernel and other ways to compute it.

Variants, all on the paged cache of vLLM's CPU attention (its layout `vec`):

- native: kernels/cpu, the tree's rows.
- gather_sdpa: keys and values gathered by torch, then scaled_dot_product_attention with a mask.
- flex: the same gather, then compiled flex_attention with the mask as a score modification.
- vllm_chain: vLLM's own kernel on 6 rows per request, as in a step with a chain of 5.
- vllm_one: vLLM's own kernel on one row per request, as in plain decoding.

`rows` is the number of requests. The mask, the gather's index and vLLM's schedule are made once and are not timed.

    python benchmarks/bench_cpu_tree_attention.py --models SmolLM2-135M Llama-3.1-8B --threads 1 --out <JSON file>
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_tree_attention import HEADS
from kernel_timing import ModelShape, Options, measure_roofline, normal, parse, time_variants, write
from torch import Tensor
from tqdm import tqdm

from vllm_eagle3.kernels import ancestor_bits, cpu
from vllm_eagle3.kernels.cpu import layout as layouts

BLOCK = 128
CONTEXTS, DRY_CONTEXTS = (128, 512, 2048), (40,)
NODES = (7, 17, 61)  # rows of a tree with its root
COMPILED_NODES = 17  # the size for which flex is timed, since each shape is compiled
CHAIN = 6
Call = Callable[[int], object]


def random_trees(requests: int, nodes: int) -> Tensor:
    """Parents int64 [requests, nodes]."""
    parents = torch.zeros(requests, nodes, dtype=torch.int64)
    for i in range(1, nodes):
        parents[:, i] = torch.randint(0, i, (requests,))
    return parents


class Case:
    """Requests with `context` cached tokens and `nodes` rows to verify."""

    def __init__(self, model: ModelShape, requests: int, context: int, nodes: int, options: Options) -> None:
        self.heads, self.kv_heads, self.dim = HEADS[model.name], model.kv_heads, model.head_dim
        self.requests, self.context, self.nodes, self.dtype = requests, context, nodes, options.dtype
        self.layout = layouts.columns(BLOCK, self.dim)
        blocks = -(-(context + nodes) // BLOCK)
        self.cache = normal(requests * blocks, self.kv_heads, BLOCK, 2 * self.dim, like=options)
        self.table = torch.randperm(requests * blocks).view(requests, blocks).int()
        self.starts = torch.arange(0, requests * nodes + 1, nodes, dtype=torch.int32)
        self.lens = torch.full((requests,), context + nodes, dtype=torch.int32)
        self.query = normal(requests * nodes, self.heads, self.dim, like=options)
        self.out = torch.empty_like(self.query)
        depth, self.bits = ancestor_bits(random_trees(requests, nodes))
        self.root = torch.full((requests * nodes,), context)
        self.positions = self.root + depth.flatten()
        self.scale = self.dim**-0.5

    def native(self) -> Call:
        bits = self.bits.flatten()
        return lambda i: cpu.tree_attention(
            self.query, self.cache, self.layout, self.table, self.starts, self.lens, self.root, bits, self.positions,
            scale=self.scale, out=self.out,
        )  # fmt: skip

    def _gathered(self) -> tuple[Callable[[], tuple[Tensor, Tensor, Tensor]], Tensor]:
        """Query, keys and values of all requests in the shapes of torch's attention, and the keys that a row sees."""
        index = (self.table[:, None].long() * self.kv_heads + torch.arange(self.kv_heads)[:, None]).flatten()
        group, length = self.heads // self.kv_heads, self.table.shape[1] * BLOCK
        seen = torch.zeros(self.requests, self.nodes, length, dtype=torch.bool)
        seen[..., : self.context] = True
        node = torch.arange(self.nodes)
        seen[..., self.context : self.context + self.nodes] = (self.bits[..., None] >> node) & 1 == 1

        def gather() -> tuple[Tensor, Tensor, Tensor]:
            flat = self.cache.view(-1, 2, BLOCK * self.dim)[index]
            keys = flat[:, 0].view(self.requests, self.kv_heads, -1, self.dim, BLOCK).transpose(3, 4)
            shape = (self.requests, self.kv_heads, length, self.dim)
            query = self.query.view(self.requests, self.nodes, self.kv_heads, group, self.dim).transpose(1, 2)
            return query.flatten(2, 3), keys.reshape(shape), flat[:, 1].reshape(shape)

        return gather, seen.repeat_interleave(group, 1)[:, None]

    def gather_sdpa(self) -> Call:
        gather, seen = self._gathered()
        bias = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, float("-inf"))

        def call(_: int) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                *gather(), attn_mask=bias, scale=self.scale
            )

        return call

    def flex(self) -> Call:
        from torch.nn.attention.flex_attention import flex_attention

        gather, seen = self._gathered()
        bias = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, float("-inf"))[:, 0]
        torch._dynamo.reset()  # torch stops compiling after eight shapes
        compiled = torch.compile(flex_attention, dynamic=False)

        def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return score + bias[batch, row, key]

        return lambda _: compiled(*gather(), score_mod=score_mod, scale=self.scale)

    def vllm(self) -> Call | str:
        try:
            from vllm import _custom_ops as ops
            from vllm.platforms import current_platform
        except ImportError as error:
            return str(error)
        current_platform.import_kernels()
        if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
            return "this vLLM has no CPU attention"
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.requests, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.dim,
            seq_lens=self.lens, dtype=self.dtype, query_start_loc=self.starts, causal=True, sliding_window_size=-1,
            isa="vec", enable_kv_split=True,
        )  # fmt: skip
        keys, values = self.cache.view(len(self.cache), self.kv_heads, 2 * BLOCK, self.dim).chunk(2, dim=2)
        return lambda _: ops.cpu_attention_with_kv_cache(
            query=self.query, key_cache=keys, value_cache=values, output=self.out, query_start_loc=self.starts,
            seq_lens=self.lens, scale=self.scale, causal=True, alibi_slopes=None, sliding_window=-1,
            block_table=self.table, softcap=0.0, scheduler_metadata=schedule, s_aux=None,
        )  # fmt: skip


def bench(model: ModelShape, requests: int, context: int, nodes: int, options: Options) -> dict[str, Any]:
    """Times of one layer."""
    case = Case(model, requests, context, nodes, options)
    calls: dict[str, Call | str] = {"native": case.native(), "gather_sdpa": case.gather_sdpa()}
    if not options.dry_run:
        if nodes == COMPILED_NODES:
            calls["flex"] = case.flex()
        calls["vllm_chain"] = Case(model, requests, context, CHAIN, options).vllm()
        calls["vllm_one"] = Case(model, requests, context, 1, options).vllm()
    _same_answers(calls)
    times = time_variants(
        {name: call for name, call in calls.items() if not isinstance(call, str)}, 2, options
    )
    missing = {name: why for name, why in calls.items() if isinstance(why, str)}
    flops = 4 * requests * nodes * case.heads * case.dim * (context + nodes / 2)
    moved = 2 * requests * case.kv_heads * case.dim * (context + nodes) * case.cache.element_size()
    result = {"model": model.name, "rows": requests, "context": context, "nodes": nodes, "us": times}
    return {**result, "missing": missing, "bytes": moved, "flops": flops}


def _same_answers(calls: dict[str, Call | str]) -> None:
    """Raise AssertionError if two variants of the tree give different results."""
    native = calls["native"](0)  # type: ignore[operator]
    for name in ("gather_sdpa", "flex"):
        call = calls.get(name)
        if callable(call):
            out: Any = call(0)
            batch, kv_heads, rows, dim = out.shape
            group = native.shape[1] // kv_heads
            out = out.view(batch, kv_heads, rows // group, group, dim).transpose(1, 2).reshape(native.shape)
            limit = 1e-4 if out.dtype == torch.float32 else 3e-2
            torch.testing.assert_close(out, native, atol=limit, rtol=limit)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__ or "", argv, rows=(1, 8))
    roofline = measure_roofline(options)
    contexts, nodes = (DRY_CONTEXTS, (9,)) if options.dry_run else (CONTEXTS, NODES)
    cases = [(m, r, c, n) for m in options.models for r in options.rows for c in contexts for n in nodes]
    results = []
    for model, requests, context, rows in tqdm(cases, disable=options.dry_run):
        result = bench(model, requests, context, rows, options)
        result["roofline_us"] = roofline.microseconds(result.pop("bytes"), result.pop("flops"))
        results.append(result)
    write(results, roofline, options, "random trees, scattered blocks of 128 tokens, layout of vLLM's `vec`")


if __name__ == "__main__":
    main()
