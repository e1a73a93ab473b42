"""Tree attention: masks against literal matrices, outputs against dense attention in float64 (20 s interpreted)."""

from __future__ import annotations

import sys

import pytest
import torch

from vllm_eagle3.kernels import ancestor_bits, node_attention, tree_attention
from vllm_eagle3.kernels.tree_attention_torch import tree_attention_torch, visible_keys

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


def random_batch(prefixes, nodes, kv_heads, heads, device="cpu", dim=8, block=16, dtype=torch.float32):
    """Arguments for requests with a tree of `nodes` rows after each prefix; None is a prefill of 5 rows.

    Cache rows past a request's last hold NaN.
    """
    torch.manual_seed(nodes)
    starts, lens, root, bits, positions = [0], [], [], [], []
    for prefix in prefixes:
        if prefix is None:
            rows, start = 5, 3
            root += range(start, start + rows)
            positions += range(start, start + rows)
            bits += [1] * rows
        else:
            rows, start = nodes, prefix
            parents = torch.tensor([[-1, *(int(torch.randint(0, i, ())) for i in range(1, nodes))]])
            depth, word = ancestor_bits(parents)
            root += [prefix] * nodes
            bits += word[0].tolist()
            positions += (prefix + depth[0]).tolist()
        starts.append(starts[-1] + rows)
        lens.append(start + rows)
    blocks = -(-max(lens) // block)
    cache = torch.randn(blocks * len(prefixes) + 3, kv_heads, block, 2 * dim)
    table = torch.randperm(len(cache))[: blocks * len(prefixes)].view(len(prefixes), blocks).int()
    for row, length in zip(table, lens, strict=True):
        for slot in range(length, blocks * block):
            cache[row[slot // block].long(), :, slot % block] = float("nan")
    query = torch.randn(starts[-1], heads, dim)
    tensors = [query.to(dtype), cache.to(dtype), table]
    tensors += [
        torch.tensor(starts).int(),
        torch.tensor(lens).int(),
        *map(torch.tensor, (root, bits, positions)),
    ]
    return [t.to(device) for t in tensors]


def dense(
    query, cache, table, starts, lens, roots, words, positions, scale, window=0, softcap=0.0, sinks=None
):
    """Dense attention, row by row in float64."""
    heads, dim = query.shape[1:]
    kv_heads = cache.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for r in range(len(lens)):
        rows = cache[table[r].long()].transpose(0, 1).reshape(kv_heads, -1, 2 * dim).double().cpu()
        for row in range(int(starts[r]), int(starts[r + 1])):
            root, bits, position = int(roots[row]), int(words[row]), int(positions[row])
            seen = [
                k
                for k in range(int(lens[r]))
                if (k < root and (not window or k > position - window))
                or (k >= root and bits >> (k - root) & 1)
            ]
            for h in range(heads):
                kv = rows[h * kv_heads // heads][seen]
                scores = kv[:, :dim] @ query[row, h].double().cpu() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double().cpu()])
                out[row, h] = scores.softmax(0)[: len(seen)] @ kv[:, dim:]
    return out


def run(batch, backend, splits=None, **options):
    rows = int(batch[3].diff().max())
    return tree_attention(*batch, max_query_len=rows, scale=0.35, splits=splits, backend=backend, **options)


@pytest.mark.parametrize(("backend", "splits"), [("torch", None), ("triton", 1), ("triton", 3)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    ("prefixes", "nodes"), [([0, 1], 1), ([15, None, 16], 9), ([17, 0, 31, None], 33), ([150], 63)]
)
def test_against_dense_attention(device, backend, splits, heads, kv_heads, prefixes, nodes):
    batch = random_batch(prefixes, nodes, kv_heads, heads, device)
    out = run(batch, backend, splits)
    torch.testing.assert_close(out.double().cpu(), dense(*batch, 0.35), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("backend", "splits"), [("torch", None), ("triton", 1), ("triton", 2)])
@pytest.mark.parametrize(
    "options", [{"window": 20}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}]
)
def test_variants(device, backend, splits, options):
    batch = random_batch([37, None, 90], 9, 2, 4, device)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = run(batch, backend, splits, **moved)
    torch.testing.assert_close(out.double().cpu(), dense(*batch, 0.35, **options), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, run(batch, backend, splits), atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_head_size_and_dtype(device, backend):
    """A head size that is no power of two, bf16, cache in the layout with heads inside a block's rows."""
    batch = random_batch([33, None], 7, 1, 2, device, dim=24, dtype=torch.bfloat16)
    expected = dense(*batch, 0.35)
    batch[1] = batch[1].transpose(1, 2).contiguous().transpose(1, 2)
    out = run(batch, backend, 2)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double().cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("splits", [2, 4])
def test_long_prefixes_are_shared_between_programs(device, splits):
    """A share has at least LEAST_KEYS keys, so a short request uses fewer shares than there are."""
    batch = random_batch([700, 3, None, 600], 5, 1, 2, device)
    out = run(batch, "triton", splits)
    torch.testing.assert_close(out.double().cpu(), dense(*batch, 0.35), atol=1e-5, rtol=1e-5)


def test_rows_that_pad_a_batch_become_zero_where_partial_sums_are_merged(device):
    """A padded row has no partial sums. The contents of its scratch memory must not reach the output."""
    batch = random_batch([600], 5, 1, 2, device)
    query = torch.cat([batch[0], torch.full_like(batch[0][:3], float("nan"))])
    padded = [torch.cat([t, torch.zeros(3, dtype=t.dtype, device=device)]) for t in batch[5:]]
    out = run([query, *batch[1:5], *padded], "triton", 2)
    torch.testing.assert_close(out[:5].double().cpu(), dense(*batch, 0.35), atol=1e-5, rtol=1e-5)
    assert (out[5:] == 0).all()


def test_output_goes_where_it_is_asked_for(device):
    batch = random_batch([40, None], 5, 2, 4, device)
    for backend in ("torch", "triton"):
        out = torch.full((len(batch[0]), 5, 8), float("nan"), device=device)[:, :4]
        assert run(batch, backend, out=out) is out
        torch.testing.assert_close(out.double().cpu(), dense(*batch, 0.35), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
@pytest.mark.parametrize("nodes", [1, 9, 63])
def test_prefix_and_nodes_merge_to_the_whole(device, backend, options, nodes):
    """FlashAttention over the prefix and `node_attention` over the rest, merged, equal `tree_attention`."""
    batch = random_batch([30, 7, 64], nodes, 2, 4, device)
    out, lse = node_attention(*batch, max_query_len=nodes, scale=0.35, backend=backend, **options)
    prefix = [
        *batch[:4],
        batch[5][batch[3][:-1].long()].int(),
        batch[5],
        torch.zeros_like(batch[6]),
        batch[7],
    ]
    before, before_lse = tree_attention_torch(*prefix, scale=0.35, **options)
    weight = torch.sigmoid(lse - before_lse).T[..., None]
    merged = weight * out + (1 - weight) * before
    torch.testing.assert_close(merged.double().cpu(), dense(*batch, 0.35, **options), atol=1e-5, rtol=1e-5)


def test_one_long_request_does_not_multiply_the_grid(device, monkeypatch):
    """A prompt of 256 rows among 8 trees of 3 rows: the grid has one program per block of rows and one per request."""
    from vllm_eagle3.kernels import tree_attention as function

    grids = []
    module = sys.modules[function.__module__]

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "tree_attention_kernel", Recorder())
    rows = torch.tensor([256, *[3] * 8])
    starts = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int()
    tokens = int(starts[-1])
    per_token = [torch.zeros(tokens, dtype=torch.int64)] * 3
    function(
        torch.zeros(tokens, 4, 8), torch.zeros(9, 1, 16, 16), torch.zeros(9, 20, dtype=torch.int32), starts,
        rows.int(), *per_token, max_query_len=256, scale=1.0, splits=1, backend="triton",
    )  # fmt: skip
    assert grids == [(tokens // 16 + 9, 1, 1)]  # 64 rows of heads a program are 16 rows of 4 heads


def test_what_does_not_fit_is_refused(device):
    batch = random_batch([5, 7], 4, 2, 2, device)
    with pytest.raises(ValueError, match="kv_heads dividing 3"):
        run([batch[0].repeat(1, 2, 1)[:, :3], *batch[1:]], "torch")
    with pytest.raises(ValueError, match="bits must be int64"):
        run([*batch[:6], batch[6].int(), batch[7]], "torch")
    with pytest.raises(ValueError, match="expected one dtype"):
        run([batch[0], batch[1].half(), *batch[2:]], "torch")
