"""g = W_fc [l; m; h]: `concat_fc` against stock vLLM's torch.cat and linear, and three partial products.

python benchmarks/bench_concat_fc.py --out benchmarks/results/concat_fc_<device>.json
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kernel_timing import ModelShape, Options, Roofline, Variant, copies, normal, run, time_variants

from vllm_eagle3.kernels import concat_fc


def bench(model: ModelShape, rows: int, options: Options, roofline: Roofline) -> dict[str, Any]:
    """Times of all variants at one shape."""
    h, ht, item = model.hidden, model.target_hidden, options.dtype.itemsize
    count = copies(options.device, 3 * h * ht * item)
    weights = [normal(h, 3 * ht, like=options, scale=(3 * ht) ** -0.5) for _ in range(count)]
    states = [[normal(rows, ht, like=options) for _ in range(3)] for _ in range(count)]
    parts = [[w[:, i * ht : (i + 1) * ht].t() for i in range(3)] for w in weights]

    def partial(i: int) -> torch.Tensor:
        (l, m, h_), (wl, wm, wh) = states[i], parts[i]  # noqa: E741 (the paper's names)
        return torch.mm(l, wl).addmm_(m, wm).addmm_(h_, wh)

    variants: dict[str, Variant] = {
        "concat_fc": lambda i: concat_fc(states[i], weights[i]),
        "cat_linear (stock)": lambda i: F.linear(torch.cat(states[i], dim=-1), weights[i]),
        "partial_addmm": partial,
    }
    if torch.device(options.device).type == "cuda":
        variants["split_k"] = lambda i: concat_fc(states[i], weights[i], backend="triton")
    flops = 2 * rows * h * 3 * ht
    num_bytes = item * (3 * h * ht + rows * (3 * ht + h))
    return {
        "model": model.name,
        "rows": rows,
        "us": time_variants(variants, count, options),
        "roofline_us": roofline.microseconds(num_bytes, flops),
    }


def main(argv: Sequence[str] | None = None) -> None:
    run(bench, __doc__, "standard normal states and weights", argv)


if __name__ == "__main__":
    main()
