"""Layouts of the CPU's cache are those that vLLM's own operation writes, and those written down here by hand."""

from __future__ import annotations

import pytest
import torch

from vllm_eagle3.kernels.cpu import layout as layouts
from vllm_eagle3.kernels.cpu import observed


def test_columns_and_pairs_drawn_by_hand():
    """Two elements of each: token 17, column 3, of blocks of 32 tokens and heads of 16."""
    columns, pairs = layouts.columns(32, 16), layouts.pairs(32, 16)
    assert columns.keys[17, 3] == 3 * 32 + 17
    assert columns.values[17, 3] == 32 * 16 + 17 * 16 + 3
    assert pairs.keys[17, 3] == 16 * 16 + 1 * 32 + 1 * 2 + 1  # second group of tokens, second pair of columns
    assert pairs.values[17, 3] == 32 * 16 + 8 * 32 + 3 * 2 + 1  # ninth pair of tokens, its second


@pytest.mark.parametrize("make", [layouts.columns, layouts.pairs, layouts.rows])
def test_what_is_written_is_observed(make):
    layout = make(48, 32)

    def write(key, value, kv_cache):
        kv_cache.view(-1)[layout.keys.long()] = key[:, 0]
        kv_cache.view(-1)[layout.values.long()] = value[:, 0]

    seen = observed(write, 48, 32, torch.bfloat16)
    assert torch.equal(seen.keys, layout.keys) and torch.equal(seen.values, layout.values)
    assert seen.kind == layout.kind


def test_a_cache_that_holds_something_else_is_refused():
    with pytest.raises(ValueError, match="layout of the cache is unknown"):
        observed(lambda key, value, kv_cache: None, 32, 32, torch.float32)


def reshape_and_cache(isa, dtype):
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("needs vLLM for CPUs")
    platforms.current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        pytest.skip("this vLLM has no CPU attention")
    from vllm import _custom_ops

    def write(key, value, kv_cache):
        size, width = kv_cache.shape[2:]
        keys, values = kv_cache.view(1, 1, 2 * size, width // 2).chunk(2, dim=2)
        try:
            _custom_ops.cpu_attn_reshape_and_cache(key, value, keys, values, torch.arange(size), isa)
        except RuntimeError as error:
            pytest.skip(f"not on this CPU: {error}")

    return write


@pytest.mark.parametrize(
    ("isa", "dtype", "block_size", "head_dim", "expected"),
    [
        ("vec", torch.float32, 128, 64, layouts.COLUMNS),
        ("vec", torch.bfloat16, 32, 96, layouts.COLUMNS),
        ("vec", torch.float16, 64, 64, layouts.COLUMNS),
        ("vec16", torch.float32, 48, 80, layouts.COLUMNS),
        ("vec16", torch.bfloat16, 128, 112, layouts.COLUMNS),
        ("amx", torch.bfloat16, 32, 64, layouts.PAIRS),
        ("amx", torch.bfloat16, 128, 96, layouts.PAIRS),
    ],
)
def test_layouts_of_vllm(isa, dtype, block_size, head_dim, expected):
    layout = observed(reshape_and_cache(isa, dtype), block_size, head_dim, dtype)
    assert layout.kind == expected
