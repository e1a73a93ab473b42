"""Tree attention in torch: masks against literal matrices, outputs against dense attention in float64 (2
s).
"""

import pytest
import torch
from vllm_eagle3.kernels import ancestor_bits

from vllm_eagle3.verification.attention import TreeMask, tree_attention, visible_keys

PARENTS = torch.tensor([[-1, 0, 0, 1, 1, 2]])


def test_mask_of_a_hand_drawn_tree():
    """Root at position 2; rows are nodes 0 to 5, columns the prefix (2) and the nodes."""
    depth, bits = ancestor_bits(PARENTS)
    assert depth.tolist() == [[0, 1, 1, 2, 2, 2]]
    root = torch.full((6,), 2)
    visible = visible_keys(root, bits[0], root + depth[0], 8)
    assert visible.int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 1, 0, 0, 1],
    ]
    windowed = visible_keys(root, bits[0], root + depth[0], 8, window=3)  # itself and two before it
    assert windowed.int()[:, :2].tolist() == [[1, 1], [0, 1], [0, 1], [0, 0], [0, 0], [0, 0]]


def random_batch(prefixes, nodes, kv_heads, heads, dim=8, block=16, seed=0):
    """Requests with a tree of `nodes` rows after `prefixes` cached tokens each; None is a prefill of 5
    rows.
    """
    torch.manual_seed(seed)
    starts, lens, root, bits, positions = [0], [], [], [], []
    for prefix in prefixes:
        if prefix is None:
            rows, start = 5, 3
            position = torch.arange(start, start + rows)
            root, bits, positions = (
                root + [position],
                bits + [torch.ones(rows).long()],
                positions + [position],
            )
        else:
            rows, start = nodes, prefix
            parents = torch.tensor([[-1, *(int(torch.randint(0, i, ())) for i in range(1, nodes))]])
            depth, word = ancestor_bits(parents)
            root = root + [torch.full((nodes,), prefix)]
            bits, positions = bits + [word[0]], positions + [prefix + depth[0].long()]
        starts.append(starts[-1] + rows)
        lens.append(start + rows)
    most = max(lens)
    blocks = -(-most // block)
    cache = torch.randn(blocks * len(prefixes) + 3, kv_heads, block, 2 * dim)
    table = torch.randperm(len(cache))[: blocks * len(prefixes)].view(len(prefixes), blocks).int()
    query = torch.randn(starts[-1], heads, dim)
    mask = TreeMask(*(torch.cat(parts) for parts in (root, bits, positions)))
    return query, cache, table, torch.tensor(starts), torch.tensor(lens), mask


def dense(query, cache, table, starts, lens, mask, scale, window=0, softcap=0.0, sinks=None):
    """Row by row in float64."""
    heads, dim = query.shape[1:]
    kv_heads = cache.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for r in range(len(lens)):
        rows = cache[table[r].long()].transpose(0, 1).reshape(kv_heads, -1, 2 * dim).double()
        for row in range(int(starts[r]), int(starts[r + 1])):
            root, bits, position = int(mask.root[row]), int(mask.bits[row]), int(mask.positions[row])
            seen = [
                k
                for k in range(int(lens[r]))
                if (k < root and (not window or k > position - window))
                or (k >= root and bits >> (k - root) & 1)
            ]
            for h in range(heads):
                kv = rows[h * kv_heads // heads][seen]
                scores = kv[:, :dim] @ query[row, h].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double()])
                out[row, h] = scores.softmax(0)[: len(seen)] @ kv[:, dim:]
    return out


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "prefixes,nodes", [([0, 1], 1), ([15, None, 16], 9), ([17, 0, 31, None], 33), ([40], 63)]
)
def test_against_dense_attention(heads, kv_heads, prefixes, nodes):
    batch = random_batch(prefixes, nodes, kv_heads, heads)
    out = tree_attention(*batch, 0.35)
    torch.testing.assert_close(out.double(), dense(*batch, 0.35), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"window": 20}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}]
)
def test_variants(options):
    batch = random_batch([37, None, 16], 9, 2, 4)
    out = tree_attention(*batch, 0.35, **options)
    torch.testing.assert_close(out.double(), dense(*batch, 0.35, **options), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, tree_attention(*batch, 0.35), atol=1e-3)


def test_padding_rows_stay_zero():
    query, cache, table, starts, lens, mask = random_batch([5, 7], 4, 2, 2)
    out = tree_attention(query, cache, table, torch.tensor([0, 4, 4]), torch.tensor([9, 0]), mask, 0.3)
    assert (out[4:] == 0).all()
