"""Attention of draft nodes in scratch against dense attention in float64 (1 s)."""

import pytest
import torch

from vllm_eagle3.drafting.attention import path_attention


@pytest.mark.parametrize("heads,kv_heads,window", [(4, 4, 0), (6, 2, 0), (6, 2, 5)])
@pytest.mark.parametrize("prefix_lens", [[1, 15, 16, 17], [33, 2, 48, 7]])
def test_path_attention(heads, kv_heads, window, prefix_lens):
    torch.manual_seed(sum(prefix_lens))
    batch, nodes, length, dim, block = len(prefix_lens), 3, 4, 8, 16
    cache = torch.randn(20, kv_heads, block, 2 * dim)
    table = torch.randperm(20)[: batch * 4].view(batch, 4).int()
    query = torch.randn(batch, nodes, heads, dim)
    keys, values = (torch.randn(batch, nodes, length, kv_heads, dim) for _ in "kv")
    lens = torch.tensor(prefix_lens)
    for b, n in enumerate(prefix_lens):  # what lies past the prefix must not matter
        cache[table[b, n // block].long(), :, n % block :] = float("nan")
    out = path_attention(query, cache, table, lens, 60, keys, values, 0.3, window)
    for b, prefix in enumerate(prefix_lens):
        rows = cache[table[b].long()].transpose(0, 1).reshape(kv_heads, -1, 2 * dim)[:, :prefix].double()
        for n in range(nodes):
            position = prefix - 1 + length
            first = max(0, position - window + 1) if window else 0
            for h in range(heads):
                kv = h * kv_heads // heads
                k = torch.cat([rows[kv, first:, :dim], keys[b, n, :, kv].double()])
                v = torch.cat([rows[kv, first:, dim:], values[b, n, :, kv].double()])
                weights = (k @ query[b, n, h].double() * 0.3).softmax(0)
                torch.testing.assert_close(out[b, n, h].double(), weights @ v, atol=1e-5, rtol=1e-5)
