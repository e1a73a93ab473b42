"""fp8 weights and bf16 weights in the draft's largest matrix product, its head. CUDA only.

python benchmarks/bench_linear_fp8.py --out benchmarks/results/linear_fp8_<device>.json
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from kernel_timing import ModelShape, Options, Roofline, Variant, copies, normal, run, time_variants

from vllm_eagle3.kernels import linear_fp8, quant_fp8


def bench(model: ModelShape, rows: int, options: Options, roofline: Roofline) -> dict[str, Any]:
    """Times of all variants at one shape. The weight is the head, [draft_vocab, hidden]."""
    h, v = model.hidden, model.draft_vocab
    count = copies(options.device, v * h)
    weights = [normal(v, h, like=options, scale=h**-0.5) for _ in range(count)]
    quantized = [quant_fp8(w) for w in weights]
    x = [normal(rows, h, like=options) for _ in range(count)]
    variants: dict[str, Variant] = {
        "linear_fp8": lambda i: linear_fp8(x[i], *quantized[i]),
        "linear": lambda i: F.linear(x[i], weights[i]),
    }
    return {
        "model": model.name,
        "rows": rows,
        "us": time_variants(variants, count, options),
        "roofline_us": roofline.microseconds(v * h + rows * h * options.dtype.itemsize, 2 * rows * v * h),
    }


def main(argv: Sequence[str] | None = None) -> None:
    run(
        bench,
        __doc__,
        "standard normal states and weights",
        argv,
        rows=(1, 4, 8, 16, 32, 64),
        cuda_only="a CPU widens fp8 weights",
    )


if __name__ == "__main__":
    main()
