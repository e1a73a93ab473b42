"""The draft's head with top-k: `head_topk`, and vLLM's scatter into the target's vocabulary.

python benchmarks/bench_head_topk.py --out benchmarks/results/head_topk_<device>.json
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kernel_timing import ModelShape, Options, Roofline, Variant, copies, normal, run, time_variants
from torch import Tensor

from vllm_eagle3.kernels import head_topk

TREE_K = 8


def stock_argmax(x: Tensor, weight: Tensor, d2t: Tensor, vocab: int) -> Tensor:
    """The work of vLLM's `Eagle3LlamaForCausalLM.compute_logits` and of its greedy draft sampler."""
    logits = F.linear(x, weight)
    targets = torch.arange(weight.shape[0], device=x.device) + d2t
    scattered = logits.new_full((x.shape[0], vocab), float("-inf"))
    scattered[:, targets] = logits
    return scattered.argmax(dim=-1)


def unfused_argmax(x: Tensor, weight: Tensor, d2t: Tensor) -> Tensor:
    """Argmax in the draft vocabulary, then the mapping; no log-sum-exp."""
    ids = F.linear(x, weight).argmax(dim=-1)
    return ids + d2t[ids]


def unfused_topk(x: Tensor, weight: Tensor, d2t: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k with log-probabilities, as tree drafting needs it."""
    top = F.linear(x, weight).float().log_softmax(dim=-1).topk(TREE_K)
    return top.values, top.indices + d2t[top.indices]


def bench(model: ModelShape, rows: int, options: Options, roofline: Roofline) -> dict[str, Any]:
    """Times of all variants at one shape."""
    h, v, item = model.hidden, model.draft_vocab, options.dtype.itemsize
    count = copies(options.device, v * h * item)
    weights = [normal(v, h, like=options, scale=h**-0.5) for _ in range(count)]
    x = [normal(rows, h, like=options) for _ in range(count)]
    kept = torch.randperm(model.vocab)[:v].sort().values
    d2t = (kept - torch.arange(v)).to(options.device)
    variants: dict[str, Variant] = {
        "head_topk k=1": lambda i: head_topk(x[i], weights[i], 1, d2t=d2t),
        "scatter_argmax (stock)": lambda i: stock_argmax(x[i], weights[i], d2t, model.vocab),
        "unfused_argmax": lambda i: unfused_argmax(x[i], weights[i], d2t),
        f"head_topk k={TREE_K}": lambda i: head_topk(x[i], weights[i], TREE_K, d2t=d2t),
        f"unfused_topk k={TREE_K}": lambda i: unfused_topk(x[i], weights[i], d2t),
    }
    return {
        "model": model.name,
        "rows": rows,
        "us": time_variants(variants, count, options),
        "roofline_us": roofline.microseconds(item * (v * h + rows * h), 2 * rows * v * h),
    }


def main(argv: Sequence[str] | None = None) -> None:
    run(bench, __doc__, "standard normal states and weights, random draft vocabulary", argv)


if __name__ == "__main__":
    main()
