"""commit_kv moves the same rows as a loop over layers and rows (3 s)."""

from __future__ import annotations

import pytest
import torch
from reference import randn

from vllm_eagle3.kernels import commit_kv, kv_table

BACKENDS = ["triton", "torch"]
BLOCKS, SIZE, HEADS = 6, 8, 3
LAYOUTS = {  # from a contiguous cache of another order to the view [blocks, 2, size, heads, dim]
    "block_major": lambda kv: kv,
    "kv_major": lambda kv: kv.transpose(0, 1).contiguous().transpose(0, 1),
    "head_major": lambda kv: kv.transpose(2, 3).contiguous().transpose(2, 3),
}


def caches(layers, dim, dtype, device, layout="block_major"):
    values = (
        randn(BLOCKS, 2, SIZE, HEADS, dim, dtype=torch.float32, device=device, seed=s) * 9
        for s in range(layers)
    )
    return [LAYOUTS[layout](v.to(dtype)) for v in values]


def expected(kv_caches, src, dst):
    """The expected cache: all rows are copied first, then written one after the other."""
    out = [kv.clone() for kv in kv_caches]
    for kv, new in zip(kv_caches, out, strict=True):
        for s, d in zip(src.flatten().tolist(), dst.flatten().tolist(), strict=True):
            if s >= 0 and d >= 0:
                new[d // SIZE, :, d % SIZE] = kv[s // SIZE, :, s % SIZE]
    return out


def same(a, b):
    """Equal bit for bit, whatever the dtype."""
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, 64), (torch.float32, 5), (torch.uint8, 7), (torch.float8_e4m3fn, 16)],
    ids=str,
)
def test_paths_move_in_every_layer(backend, layout, dtype, dim, device):
    kv = caches(3, dim, dtype, device, layout)
    slots = (
        torch.randperm(BLOCKS * SIZE, generator=torch.Generator().manual_seed(0))[:24].view(3, 8).to(device)
    )
    # Overlapping moves (one move's source is another's target), a move to the same slot, a whole line.
    path = torch.tensor([[0, 2, 3, 7, 5], [0, 1, 4, 4, 5], [0, 1, 2, 3, 4]], device=device)
    src, dst = slots.gather(1, path), slots[:, :5].clone()
    dst[1, 4] = -1
    want = expected(kv, src, dst)
    assert not same(want, kv)
    commit_kv(kv_table(kv), src.int(), dst, backend=backend)
    assert same(kv, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_outside_the_cache_are_left_alone(backend, device):
    kv = caches(2, 16, torch.float32, device)
    before = [x.clone() for x in kv]
    src = torch.tensor([[-1, 3, BLOCKS * SIZE, 2]], device=device)
    dst = torch.tensor([[1, BLOCKS * SIZE, 1, -5]], device=device)
    commit_kv(kv_table(kv), src, dst, backend=backend)
    assert same(kv, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing_to_move(backend, shape, device):
    kv = caches(1, 16, torch.float32, device)
    before = [x.clone() for x in kv]
    none = torch.zeros(shape, dtype=torch.int64, device=device)
    commit_kv(kv_table(kv), none, none, backend=backend)
    assert same(kv, before)


@pytest.mark.parametrize(
    ("dtype", "dim", "word"),
    [(torch.bfloat16, 64, torch.int64), (torch.bfloat16, 6, torch.int32), (torch.uint8, 7, torch.int8)],
    ids=str,
)
def test_words_are_as_wide_as_rows_allow(dtype, dim, word):
    assert kv_table(caches(1, dim, dtype, "cpu")).caches[0].dtype == word


def test_bad_arguments_name_what_was_found():
    kv = caches(2, 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match="layer 1 differs"):
        kv_table([kv[0], kv[1].half()])
    with pytest.raises(ValueError, match="kv_caches is empty"):
        kv_table([])
    with pytest.raises(ValueError, match=r"found shape \(2, 6, 8, 3, 16\)"):
        kv_table([kv[0].transpose(0, 1)])
    table, slots = kv_table(kv), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"found \(1, 3\) and \(1, 2\)"):
        commit_kv(table, slots, slots[:, :2])
    with pytest.raises(ValueError, match="dst_slots must be int32 or int64"):
        commit_kv(table, slots, slots.float())
