"""[norm(embedding); norm(g)]: `norm_concat` against plain torch and, if installed, vLLM's kernels.

python benchmarks/bench_norm_concat.py --out benchmarks/results/norm_concat_<device>.json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kernel_timing import (
    ModelShape,
    Options,
    Roofline,
    Variant,
    copies,
    normal,
    run,
    time_variants,
)
from torch import Tensor

from vllm_eagle3.kernels import norm_concat

EPS = 1e-6
TABLE_ROWS = 32768  # of the embedding; enough to miss caches


def vllm_rms_norm() -> Callable[[Tensor, Tensor, Tensor, float], None] | None:
    """vLLM's custom op (out, input, weight, epsilon), or None where it is not installed."""
    try:
        import vllm._custom_ops as ops
    except ImportError:
        return None
    return ops.rms_norm


def bench(model: ModelShape, rows: int, options: Options, roofline: Roofline) -> dict[str, Any]:
    """Times of every variant at one shape."""
    h, item = model.hidden, options.dtype.itemsize
    count = copies(options.device, rows * h * item)
    table = normal(min(TABLE_ROWS, model.vocab), h, like=options)
    ids = [torch.randint(0, table.shape[0], (rows,), device=options.device) for _ in range(count)]
    g = [normal(rows, h, like=options) for _ in range(count)]
    w_in, w_hidden = normal(h, like=options), normal(h, like=options)
    rms_norm = vllm_rms_norm()

    def stock(i: int) -> Tensor:
        assert rms_norm is not None
        e = F.embedding(ids[i], table)
        normed_e, normed_g = torch.empty_like(e), torch.empty_like(e)
        rms_norm(normed_e, e, w_in, EPS)
        rms_norm(normed_g, g[i], w_hidden, EPS)
        return torch.cat([normed_e, normed_g], dim=-1)

    def unfused(i: int) -> Tensor:
        e = F.rms_norm(F.embedding(ids[i], table), (h,), w_in, EPS)
        return torch.cat([e, F.rms_norm(g[i], (h,), w_hidden, EPS)], dim=-1)

    variants: dict[str, Variant] = {
        "norm_concat": lambda i: norm_concat(table, g[i], w_in, w_hidden, ids=ids[i], eps=EPS),
        "unfused": unfused,
    }
    if rms_norm is not None:
        variants["vllm ops + cat (stock)"] = stock
    return {
        "model": model.name,
        "rows": rows,
        "us": time_variants(variants, count, options),
        "roofline_us": roofline.microseconds(4 * rows * h * item, 0),
    }


def main(argv: Sequence[str] | None = None) -> None:
    run(bench, __doc__, "standard normal states, uniform random ids", argv)


if __name__ == "__main__":
    main()
