"""Native tree attention and its torch twin against dense attention in float64, in every layout of the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import LAYOUTS, TOLERANCE, fill

from vllm_eagle3.kernels import ancestor_bits
from vllm_eagle3.kernels.cpu import layout as layouts
from vllm_eagle3.kernels.cpu import tree_attention

BACKENDS = ["native", "torch"]


class Batch:
    """Requests with a tree after each prefix. A negative prefix -n is a chunk of n rows of a prompt.

    All keys and values in the cache that no row sees are NaN.
    """

    def __init__(
        self, prefixes, nodes, kv_heads, group, dim=16, block=32, dtype=torch.float32, kind="columns", seed=0
    ):
        generator = torch.Generator().manual_seed(seed)
        self.layout = LAYOUTS[kind](block, dim)
        starts, lens, root, bits, positions = [0], [], [], [], []
        for prefix in prefixes:
            if prefix < 0:
                rows, start = -prefix, 3
                root += range(start, start + rows)
                positions += range(start, start + rows)
                bits += [1] * rows
            else:
                rows, start = nodes, prefix
                drawn = [int(torch.randint(0, i, (), generator=generator)) for i in range(1, nodes)]
                depth, word = ancestor_bits(torch.tensor([[-1, *drawn]]))
                root += [prefix] * nodes
                bits += word[0].tolist()
                positions += (prefix + depth[0]).tolist()
            starts.append(starts[-1] + rows)
            lens.append(start + rows)
        (self.keys, self.values), self.cache, self.table = fill(lens, self.layout, kv_heads, dtype, generator)
        self.query = torch.randn(starts[-1], kv_heads * group, dim, generator=generator).to(dtype)
        self.starts, self.lens = torch.tensor(starts).int(), torch.tensor(lens).int()
        self.root, self.bits, self.positions = (
            torch.tensor(x, dtype=torch.int64) for x in (root, bits, positions)
        )

    def run(self, backend, **options):
        out = torch.full_like(self.query, float("nan"))
        return tree_attention(
            self.query, self.cache, self.layout, self.table, self.starts, self.lens, self.root, self.bits,
            self.positions, scale=0.35, out=out, backend=backend, **options,
        )  # fmt: skip

    def dense(self, window=0, softcap=0.0, sinks=None):
        """Dense attention, row by row and head by head in float64."""
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        heads = self.query.shape[1]
        for r, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            for t in range(int(self.starts[r]), int(self.starts[r + 1])):
                root, bits, position = int(self.root[t]), int(self.bits[t]), int(self.positions[t])
                seen = [
                    k
                    for k in range(len(keys))
                    if (k < root and (not window or k > position - window))
                    or (k >= root and bits >> (k - root) & 1)
                ]
                for h in range(heads):
                    kv_head = h * keys.shape[1] // heads
                    scores = keys[seen, kv_head].double() @ self.query[t, h].double() * 0.35
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sinks is not None:
                        scores = torch.cat([scores, sinks[h : h + 1].double()])
                    out[t, h] = scores.softmax(0)[: len(seen)] @ values[seen, kv_head].double()
        return out

    def check(self, backend, **options):
        expected = self.dense(**options)
        limit = TOLERANCE[self.query.dtype] * max(float(expected.abs().max()), 1.0)
        torch.testing.assert_close(self.run(backend, **options).double(), expected, atol=limit, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("prefixes", "nodes", "kv_heads", "group"),
    [
        ([0, 1], 1, 2, 1),
        ([31, -5, 32], 9, 2, 3),
        ([33, 0, 63, -40], 33, 1, 3),
        ([150], 63, 3, 1),
        ([64], 17, 1, 80),
    ],
)
def test_against_dense_attention(backend, kind, dtype, prefixes, nodes, kv_heads, group):
    Batch(prefixes, nodes, kv_heads, group, kind=kind, dtype=dtype).check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options", [{"window": 20}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}]
)
def test_variants(backend, dtype, options):
    batch = Batch([37, -9, 190], 9, 2, 2, dtype=dtype)
    batch.check(backend, **options)
    assert not torch.allclose(batch.run(backend, **options), batch.run(backend), atol=1e-2)


@settings(max_examples=150, deadline=None)
@given(
    prefixes=st.lists(st.one_of(st.integers(0, 200), st.integers(-70, -1)), min_size=1, max_size=4),
    nodes=st.integers(1, 63),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    dim=st.sampled_from([16, 32, 80, 128]),
    block=st.sampled_from([16, 32, 48, 128]),
    kind=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(list(TOLERANCE)),
    window=st.sampled_from([0, 64, 100]),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_anything_against_the_twin(
    prefixes, nodes, kv_heads, group, dim, block, kind, dtype, window, softcap, seed
):
    batch = Batch(prefixes, nodes, kv_heads, group, dim, block, dtype, kind, seed)
    twin = batch.run("torch", window=window, softcap=softcap).double()
    out = batch.run("native", window=window, softcap=softcap).double()
    limit = 2 * TOLERANCE[dtype] * max(float(twin.abs().max()), 1.0)
    torch.testing.assert_close(out, twin, atol=limit, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_a_window_has_freed_are_not_read(backend):
    """vLLM puts block 0 in place of a window's old blocks, and block 0 may contain anything."""
    batch = Batch([190], 9, 1, 2)
    expected = batch.dense(window=40)
    batch.table[0, :4] = 0
    batch.cache[0] = float("nan")
    torch.testing.assert_close(batch.run(backend, window=40).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_left_alone(backend):
    """vLLM pads a batch with rows and requests after the last one, by repeating the last value of query_start_loc."""
    batch = Batch([40, 70], 5, 1, 2)
    expected = batch.dense()
    batch.query = torch.cat([batch.query, torch.full((3, 2, 16), float("nan"))])
    batch.starts = torch.tensor([0, 5, 10, 10]).int()
    batch.lens = torch.cat([batch.lens, torch.zeros(1).int()])
    batch.table = torch.cat([batch.table, torch.full_like(batch.table[:1], 10**6)])
    batch.root, batch.bits, batch.positions = (
        torch.cat([x, torch.full((3,), 2**40)]) for x in (batch.root, batch.bits, batch.positions)
    )
    out = batch.run(backend)
    torch.testing.assert_close(out[:10].double(), expected, atol=1e-5, rtol=0)
    assert out[10:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_layer_of_a_cache_of_several(backend):
    """Strided blocks and heads, strided rows of query and output."""
    batch = Batch([40, 70], 5, 2, 2)
    expected = batch.dense()
    wide = torch.full((len(batch.cache), 2, 3, 32, 32), float("nan"))
    wide[:, :, 1] = batch.cache
    batch.cache = wide[:, :, 1]
    wide = torch.full((10, 7, 16), float("nan"))
    wide[:, 2:6] = batch.query
    batch.query = wide[:, 2:6]
    torch.testing.assert_close(batch.run(backend).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_broken_key_is_not_hidden(backend, what):
    """With NaN in the first token's key or value, all rows of that request are NaN, and no other row is."""
    batch = Batch([40, 70], 5, 1, 2)
    element = getattr(batch.layout, what)[0].long()
    batch.cache[batch.table[0, 0]].flatten(1)[0, element] = float("nan")
    out = batch.run(backend)
    assert out[:5].isnan().any(-1).all() and not out[5:].isnan().any()


def test_what_does_not_fit_is_refused():
    batch = Batch([5, 7], 4, 2, 1)
    batch.bits = batch.bits.int()
    with pytest.raises(ValueError, match="bits must be int64"):
        batch.run("native")
    batch = Batch([5, 7], 4, 2, 1)
    batch.cache = batch.cache.bfloat16()
    with pytest.raises(ValueError, match="float32 and torch.bfloat16"):
        batch.run("native")
    batch = Batch([5, 7], 4, 2, 1)
    batch.query = batch.query.repeat(1, 2, 1)[:, :3]
    with pytest.raises(ValueError, match="kv_heads dividing 3"):
        batch.run("native")
    with pytest.raises(ValueError, match="multiples of 16"):
        layouts.columns(40, 16)
    with pytest.raises(ValueError, match="backend must be"):
        Batch([5], 4, 2, 1).run("triton")
