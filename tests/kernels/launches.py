"""Print which compilations of the draft's kernels the start-up makes, and which ones batches of any size need.

Launches are only noted, on tensors without memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from sm90 import describe
from triton.runtime.jit import JITFunction

from vllm_eagle3 import kernels as k
from vllm_eagle3.kernels.concat_fc import SPLIT_K_MAX_ROWS

H, VOCAB, ROWS = 4096, 32000, range(1, 700)


def launches(call: Callable[[], object]) -> set[str]:
    """What Triton compiles for `call`: by launch, the kernel with the types and constants of its arguments."""
    seen: set[str] = set()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        bound = self.signature.bind(*args, **kwargs).arguments
        seen.add(repr((self.fn.__name__, *describe(self, dict(bound)), options)))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return seen


def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def draft(rows: int) -> None:
    """What the draft launches for so many rows: fuse, the layer in fp8, and the likeliest token or ten of them."""
    if rows <= SPLIT_K_MAX_ROWS:
        for norms in (None, [of(H)] * 3):
            k.concat_fc([of(rows, H)] * 3, of(H, 3 * H), norm_weights=norms, backend="triton")
    head, w8, scale = of(VOCAB, H), of(VOCAB, H, dtype=torch.float8_e4m3fn), of(VOCAB, dtype=torch.float32)
    for count in (1, 10):
        d2t = of(VOCAB, dtype=torch.int64)
        k.head_topk(of(rows, H), head, count, d2t=d2t, backend="triton")
        if rows <= k.MOST_ROWS:
            k.head_topk(of(rows, H), w8, count, d2t=d2t, weight_scale=scale, backend="triton")
    if rows <= k.MOST_ROWS:
        k.linear_fp8(of(rows, H), w8, scale, backend="triton")


def nodes(requests: int) -> None:
    """The attention of verified trees beside FlashAttention."""
    tokens = 60 * requests
    table, lens = of(requests, 512, dtype=torch.int32), of(requests, dtype=torch.int32)
    mask = [of(tokens, dtype=torch.int64)] * 3
    k.node_attention(
        of(tokens, 32, 128), of(999, 8, 16, 256), table, of(requests + 1, dtype=torch.int32), lens, *mask,
        max_query_len=60, scale=0.1, backend="triton",
    )  # fmt: skip


def main() -> None:
    started = set().union(*(launches(lambda n=n: draft(n)) for n in k.ROWS_OF_EACH_TILE))
    serving = set().union(*(launches(lambda n=n: draft(n)) for n in ROWS))
    attention = set().union(*(launches(lambda n=n: nodes(n)) for n in range(1, 257)))
    found = {"started": sorted(started), "serving": sorted(serving), "attention": sorted(attention)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
