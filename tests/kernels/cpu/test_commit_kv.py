"""Committing an accepted path in a CPU's cache moves these tokens and nothing else, in every layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import LAYOUTS

from vllm_eagle3.kernels.cpu import commit_kv, kv_table

BACKENDS = ["native", "torch"]


def caches(layers, blocks, kv_heads, layout, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, kv_heads, layout.block_size, 2 * layout.head_dim)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(layers)]


def token(cache, layout, slot):
    """Keys and values of a slot, [kv_heads, 2 * head_dim]."""
    flat, offset = cache.flatten(2)[slot // layout.block_size], slot % layout.block_size
    return torch.cat([flat[:, layout.keys[offset].long()], flat[:, layout.values[offset].long()]], dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kv_heads=st.integers(1, 3),
    dim=st.sampled_from([16, 48]),
    paths=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=3),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 9),
)
def test_paths_move_to_linear_slots(backend, kind, dtype, kv_heads, dim, paths, index, seed):
    """Request r owns 15 slots of block r; its path takes some of them in ascending order."""
    layout = LAYOUTS[kind](16, dim)
    before = caches(2, 5, kv_heads, layout, dtype, seed)
    after = [cache.clone() for cache in before]
    steps = torch.tensor(paths)
    first = 16 * torch.arange(len(paths))[:, None]
    dst = first + torch.arange(1, 4)
    src = first + (steps + 1).cumsum(1).clamp(max=15)
    commit_kv(kv_table(after, layout), src.to(index), dst.to(index), backend=backend)
    moved = dict(zip(dst.flatten().tolist(), src.flatten().tolist(), strict=True))
    for old, new in zip(before, after, strict=True):
        for slot in range(5 * 16):
            assert torch.equal(token(new, layout, slot), token(old, layout, moved.get(slot, slot)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_swap_reads_before_it_writes(backend):
    layout = LAYOUTS["columns"](32, 16)
    [before] = caches(1, 2, 2, layout, torch.float32)
    after = before.clone()
    commit_kv(kv_table([after], layout), torch.tensor([[3, 40]]), torch.tensor([[40, 3]]), backend=backend)
    assert torch.equal(token(after, layout, 3), token(before, layout, 40))
    assert torch.equal(token(after, layout, 40), token(before, layout, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_outside_the_cache_are_left_out(backend):
    layout = LAYOUTS["pairs"](16, 16)
    [before] = caches(1, 2, 1, layout, torch.bfloat16)
    after = before.clone()
    src, dst = torch.tensor([[-1, 3, 32, 4, 5]]), torch.tensor([[2, -1, 6, 99, 5]])
    commit_kv(kv_table([after], layout), src, dst, backend=backend)
    assert torch.equal(after, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_layer_of_a_cache_of_several(backend):
    layout = LAYOUTS["columns"](16, 16)
    wide = torch.randn(4, 2, 3, 16, 32)
    before = wide.clone()
    commit_kv(kv_table([wide[:, :, 1]], layout), torch.tensor([[9]]), torch.tensor([[50]]), backend=backend)
    assert torch.equal(token(wide[:, :, 1], layout, 50), token(before[:, :, 1], layout, 9))
    assert torch.equal(wide[:, :, ::2], before[:, :, ::2])


def test_what_does_not_fit_is_refused():
    layout = LAYOUTS["columns"](16, 16)
    with pytest.raises(ValueError, match="kv_caches is empty"):
        kv_table([], layout)
    with pytest.raises(ValueError, match=r"must be \[num_blocks, kv_heads, 16, 32\]"):
        kv_table([torch.zeros(2, 1, 32, 32)], layout)
    with pytest.raises(ValueError, match="layer 1 differs"):
        kv_table([torch.zeros(2, 1, 16, 32), torch.zeros(3, 1, 16, 32)], layout)
    table = kv_table([torch.zeros(2, 1, 16, 32)], layout)
    with pytest.raises(ValueError, match="must both be"):
        commit_kv(table, torch.zeros(1, 2).long(), torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match="int32 or int64"):
        commit_kv(table, torch.zeros(1, 2), torch.zeros(1, 2).long())
