"""Attention of draft nodes in scratch against dense attention in float64. About 15 s interpreted."""

from __future__ import annotations

import sys

import pytest
import torch

from vllm_eagle3.kernels import path_attention

NODES, SLOTS, BLOCK = 3, 11, 16


def random_level(prefix_lens, heads, kv_heads, length, device="cpu", dim=8, dtype=torch.float32):
    """Arguments for a level of NODES nodes per request at depth `length`.

    Cache rows past a prefix and slots of scratch that no path names hold NaN.
    """
    torch.manual_seed(sum(prefix_lens) + length)
    batch, columns = len(prefix_lens), max(prefix_lens) // BLOCK + 1
    cache = torch.randn(batch * columns + 3, kv_heads, BLOCK, 2 * dim)
    table = torch.randperm(len(cache))[: batch * columns].view(batch, columns).int()
    for row, prefix in zip(table, prefix_lens, strict=True):
        for position in range(prefix, columns * BLOCK):
            cache[row[position // BLOCK].long(), :, position % BLOCK] = float("nan")
    paths = torch.stack([torch.randperm(SLOTS)[:length] for _ in range(batch * NODES)])
    paths = paths.view(batch, NODES, length)
    keys, values = (torch.full((batch + 1, SLOTS, kv_heads, dim), float("nan")) for _ in "kv")
    for b in range(batch):
        named = paths[b].unique()
        keys[b, named], values[b, named] = torch.randn(2, len(named), kv_heads, dim).unbind()
    qkv = torch.randn(batch * NODES, 3 * heads, dim)  # rows further apart than they are wide
    lens = torch.tensor(prefix_lens).int()
    qkv, cache, keys, values = (t.to(device, dtype) for t in (qkv, cache, keys, values))
    query = qkv[:, :heads].view(batch, NODES, heads, dim)
    return query, cache, table.to(device), lens.to(device), keys, values, paths.to(device)


def dense(query, cache, table, lens, keys, values, paths, scale, window=0):
    """Dense attention, node by node in float64."""
    batch, _, heads, dim = query.shape
    kv_heads, length = cache.shape[1], paths.shape[2]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        rows = cache[table[b].long()].transpose(0, 1).reshape(kv_heads, -1, 2 * dim).double().cpu()
        prefix = int(lens[b])
        first = max(0, prefix + length - window) if window else 0
        for n in range(NODES):
            for h in range(heads):
                kv = h * kv_heads // heads
                k = torch.cat([rows[kv, first:prefix, :dim], keys[b, paths[b, n], kv].double().cpu()])
                v = torch.cat([rows[kv, first:prefix, dim:], values[b, paths[b, n], kv].double().cpu()])
                weights = (k @ query[b, n, h].double().cpu() * scale).softmax(0)
                out[b, n, h] = weights @ v
    return out


@pytest.mark.parametrize(("backend", "splits"), [("torch", None), ("triton", 1), ("triton", 4)])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 4, 0), (6, 2, 0), (6, 2, 7), (34, 2, 0)])
@pytest.mark.parametrize("prefix_lens", [[1, 15, 16, 17], [33, 2, 150, 7]])
@pytest.mark.parametrize("length", [1, 4])
def test_against_dense_attention(device, backend, splits, heads, kv_heads, window, prefix_lens, length):
    level = random_level(prefix_lens, heads, kv_heads, length, device)
    out = path_attention(*level, scale=0.3, window=window, splits=splits, backend=backend)
    expected = dense(*level, 0.3, window)
    torch.testing.assert_close(out.double().cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    level = random_level([40, 3], 6, 2, 3, device, dtype=dtype)
    for backend in ("torch", "triton"):
        out = path_attention(*level, scale=0.3, backend=backend)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double().cpu(), dense(*level, 0.3), atol=0.03, rtol=0.03)


def test_the_torch_twin_gathers_in_pieces(monkeypatch):
    level = random_level([33, 2, 150, 7], 6, 2, 2)
    whole = path_attention(*level, scale=0.3, backend="torch")
    monkeypatch.setattr(sys.modules[path_attention.__module__], "GATHERED", 1)
    torch.testing.assert_close(path_attention(*level, scale=0.3, backend="torch"), whole)


def test_no_requests(device):
    query, cache, table, lens, keys, values, paths = random_level([5], 4, 4, 2, device)
    for backend in ("torch", "triton"):
        out = path_attention(
            query[:0], cache, table[:0], lens[:0], keys, values, paths[:0], scale=1.0, backend=backend
        )
        assert out.shape == (0, *query.shape[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(3, 2, 16, 12)}, "kv_cache must be"),
        ({4: torch.zeros(1, SLOTS, 4, 8)}, "keys must be"),
        ({5: torch.zeros(5, SLOTS, 3, 8)}, "values must be"),
        ({5: torch.zeros(5, SLOTS, 2, 8).half()}, "one dtype"),
        ({6: torch.zeros(4, NODES, 0, dtype=torch.int64)}, "paths must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    level = list(random_level([1, 2, 3, 4], 4, 2, 2))
    for index, value in change.items():
        level[index] = value
    with pytest.raises(ValueError, match=message):
        path_attention(*level, scale=1.0)
