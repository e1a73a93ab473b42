"""Native path attention and its torch twin against dense attention in float64, in every layout of the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import LAYOUTS, TOLERANCE, fill

from vllm_eagle3.kernels.cpu import path_attention

BACKENDS = ["native", "torch"]


class Level:
    """The last level of trees that expand `nodes` nodes a level, after each prefix. Unused memory holds NaN."""

    def __init__(
        self,
        prefixes,
        nodes,
        length,
        kv_heads,
        group,
        dim=16,
        block=32,
        dtype=torch.float32,
        kind="columns",
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        batch = len(prefixes)
        self.layout, self.prefix = LAYOUTS[kind](block, dim), torch.tensor(prefixes).int()
        self.cached, self.cache, self.table = fill(prefixes, self.layout, kv_heads, dtype, generator)
        slots = nodes * length
        self.scratch = [
            torch.full((batch + 1, slots + 2, kv_heads, dim), float("nan"), dtype=dtype) for _ in "kv"
        ]
        for scratch in self.scratch:  # all levels before this one
            shape = (batch, slots - nodes, kv_heads, dim)
            scratch[:batch, : slots - nodes] = torch.randn(shape, generator=generator).to(dtype)
        ancestors = torch.randint(0, nodes, (batch, nodes, length - 1), generator=generator)
        ancestors += torch.arange(length - 1) * nodes
        own = (slots - nodes + torch.arange(nodes)).expand(batch, nodes)
        self.paths = torch.cat([ancestors, own[..., None]], dim=-1)
        rows = batch * nodes
        self.new = [torch.randn(rows, kv_heads, dim, generator=generator).to(dtype) for _ in "kv"]
        self.query = torch.randn(rows, kv_heads * group, dim, generator=generator).to(dtype)

    def run(self, backend, window=0):
        """Run it twice: with `new`, and with these rows already in scratch."""
        keys, values = (x.clone() for x in self.scratch)
        args = (self.query, self.cache, self.layout, self.table, self.prefix, keys, values, self.paths)
        options = {"scale": 0.35, "window": window, "backend": backend}
        out = path_attention(*args, new=tuple(self.new), **options)
        for r, paths in enumerate(self.paths):
            nodes = len(paths)
            assert torch.equal(keys[r, paths[:, -1]], self.new[0][r * nodes : (r + 1) * nodes])
            assert torch.equal(values[r, paths[:, -1]], self.new[1][r * nodes : (r + 1) * nodes])
        assert torch.equal(out, path_attention(*args, **options))
        return out

    def dense(self, window=0):
        batch, nodes, length = self.paths.shape
        heads = self.query.shape[1]
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        for r in range(batch):
            first = max(int(self.prefix[r]) + length - window, 0) if window else 0
            for n in range(nodes):
                row, path = r * nodes + n, self.paths[r, n]
                for h in range(heads):
                    kv = []
                    for cached, scratch, new in zip(self.cached, self.scratch, self.new, strict=True):
                        kv_head = h * new.shape[1] // heads
                        parts = [
                            cached[r][first:, kv_head],
                            scratch[r, path[:-1], kv_head],
                            new[row, kv_head][None],
                        ]
                        kv.append(torch.cat(parts).double())
                    scores = kv[0] @ self.query[row, h].double() * 0.35
                    out[row, h] = scores.softmax(0) @ kv[1]
        return out

    def check(self, backend, window=0):
        expected = self.dense(window)
        limit = TOLERANCE[self.query.dtype] * max(float(expected.abs().max()), 1.0)
        torch.testing.assert_close(self.run(backend, window).double(), expected, atol=limit, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("prefixes", "nodes", "length", "kv_heads", "group"),
    [([1], 1, 1, 1, 1), ([31, 64, 1], 4, 5, 2, 3), ([33, 150], 10, 9, 3, 1), ([190], 3, 17, 1, 30)],
)
def test_against_dense_attention(backend, kind, dtype, prefixes, nodes, length, kv_heads, group):
    Level(prefixes, nodes, length, kv_heads, group, kind=kind, dtype=dtype).check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_window(backend):
    level = Level([37, 5, 190], 4, 3, 2, 2)
    level.check(backend, window=20)
    assert not torch.allclose(level.run(backend, 20), level.run(backend), atol=1e-2)


@settings(max_examples=100, deadline=None)
@given(
    prefixes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    nodes=st.integers(1, 10),
    length=st.integers(1, 12),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    dim=st.sampled_from([16, 32, 80, 128]),
    block=st.sampled_from([16, 32, 48, 128]),
    kind=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(list(TOLERANCE)),
    window=st.sampled_from([0, 13, 100]),
    seed=st.integers(0, 99),
)
def test_anything_against_the_twin(
    prefixes, nodes, length, kv_heads, group, dim, block, kind, dtype, window, seed
):
    level = Level(prefixes, nodes, length, kv_heads, group, dim, block, dtype, kind, seed)
    twin, out = level.run("torch", window).double(), level.run("native", window).double()
    limit = 2 * TOLERANCE[dtype] * max(float(twin.abs().max()), 1.0)
    torch.testing.assert_close(out, twin, atol=limit, rtol=0)


def test_rows_of_one_projection():
    """Query, keys and values are columns of one product, as in the draft."""
    level = Level([40, 70], 4, 2, 2, 2)
    expected = level.run("native")
    joint = torch.cat([level.query, *level.new], dim=1)
    level.query, *level.new = joint.split([4, 2, 2], dim=1)
    assert torch.equal(level.run("native"), expected)


def test_what_does_not_fit_is_refused():
    level = Level([5], 4, 2, 2, 1)
    level.scratch[1] = level.scratch[1].bfloat16()
    with pytest.raises(ValueError, match="values must be torch.float32"):
        level.run("native")
    level = Level([5], 4, 2, 2, 1)
    level.paths = level.paths.int()
    with pytest.raises(ValueError, match="paths must be int64"):
        level.run("native")
    level = Level([5], 4, 2, 2, 1)
    level.prefix = level.prefix.repeat(2)
    with pytest.raises(ValueError, match="prefix_lens"):
        level.run("native")
