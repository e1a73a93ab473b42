"""head_topk and its form for several ranks: kernels and torch twin against fp64 logits. About 10 s interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import DTYPES, TOLERANCE, assert_near, randn, strided

from vllm_eagle3.kernels import head_topk, quant_fp8, sharded_topk
from vllm_eagle3.kernels.head_shards import local_topk, merge_topk
from vllm_eagle3.kernels.head_topk import pack_keys, unpack_keys

BACKENDS = ["triton", "torch"]


def make(n, vocab, h, dtype, device):
    x = randn(n, h, dtype=dtype, device=device)
    return x, (randn(vocab, h, dtype=dtype, device=device, seed=1) / h**0.5).to(dtype)


def check(out, x, weight, k, d2t=None, scale=1.0):
    """The ids belong to logits of the right size. The order of ids may differ only among nearly equal logits."""
    logits = scale * (x.double() @ weight.double().T).cpu()
    assert out.ids.shape == out.draft_ids.shape == out.logits.shape == (x.shape[0], k)
    assert out.ids.dtype == out.draft_ids.dtype == torch.int64
    draft_ids, limit = out.draft_ids.cpu(), TOLERANCE[x.dtype] * abs(scale) * 4
    best = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(out.ids.cpu(), draft_ids if d2t is None else draft_ids + d2t.cpu()[draft_ids])
    assert all(len(set(row)) == k for row in draft_ids.tolist())
    clear = (
        (best.values[:, :k] - best.values[:, 1 : k + 1]).abs() > 2 * limit if k < logits.shape[1] else None
    )
    if clear is not None and x.dtype == torch.float32:
        clear[:, 1:] &= clear[:, :-1].clone()
        assert torch.equal(draft_ids[clear], best.indices[:, :k][clear]) and clear.any()
    torch.testing.assert_close(logits.gather(1, draft_ids), best.values[:, :k], rtol=0, atol=2 * limit)
    torch.testing.assert_close(out.logits.double().cpu(), best.values[:, :k], rtol=0, atol=2 * limit)
    torch.testing.assert_close(out.lse.double().cpu(), logits.logsumexp(1), rtol=0, atol=2 * limit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 10])
def test_odd_sizes(backend, dtype, k, device):
    x, weight = make(5, 577, 123, dtype, device)
    d2t = torch.arange(577, device=device) * 2
    out = head_topk(x, weight, k, d2t=d2t, logit_scale=0.5, backend=backend)
    check(out, x, weight, k, d2t, 0.5)


@pytest.mark.parametrize("n", [0, 1, 17, 33, 65])
def test_row_counts(n, device):
    x, weight = make(n, 200, 64, torch.float32, device)
    if n == 0:
        out = head_topk(x, weight, 4, backend="triton")
        assert out.ids.shape == (0, 4) and out.lse.shape == (0,)
    else:
        check(head_topk(x, weight, 4, backend="triton"), x, weight, 4)


def test_strided_rows(device):
    x, weight = make(3, 150, 70, torch.float32, device)
    check(head_topk(strided(x), strided(weight), 5, backend="triton"), x, weight, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 5])
def test_ties_go_to_the_lowest_id(backend, k, device):
    weight = torch.zeros(400, 16, device=device)
    weight[[399, 7, 130, 131, 8], 0] = 1.0
    x = torch.ones(2, 16, device=device)
    out = head_topk(x, weight, k, backend=backend)
    assert out.draft_ids.tolist() == [[7, 8, 130, 131, 399][:k]] * 2
    out = head_topk(x, -weight, 4, backend=backend)
    assert out.draft_ids.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_zero_ties_with_zero(backend, device):
    weight = torch.zeros(140, 16, device=device)
    weight[0, 0] = -1e-30
    out = head_topk(torch.ones(1, 16, device=device), weight, 3, logit_scale=1e-30, backend=backend)
    assert out.logits.tolist() == [[0.0] * 3]
    assert out.draft_ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_k_equal_to_the_vocabulary_sorts_it(backend, device):
    x, weight = make(2, 20, 33, torch.float32, device)
    check(head_topk(x, weight, 20, backend=backend), x, weight, 20)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf(backend, device):
    x, weight = make(3, 150, 16, torch.float32, device)
    clean = head_topk(x, weight, 2, backend=backend)
    weight[140] = torch.tensor([float("inf")] + [0.0] * 15)
    x[:, 0] = x[:, 0].abs()
    x[1, 3] = torch.tensor(-0x00400000, dtype=torch.int32).view(torch.float32)  # a NaN with its sign bit set
    out = head_topk(x, weight, 2, backend=backend)
    assert out.logits[1].isnan().all() and out.lse[1].isnan()
    assert out.draft_ids[1].tolist() == [0, 1]
    assert out.draft_ids[[0, 2], 0].tolist() == [140, 140]
    assert (out.logits[[0, 2], 0] == float("inf")).all() and (out.lse[[0, 2]] == float("inf")).all()
    assert clean.logits.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_shards_merge_to_the_whole(backend, device):
    x, weight = make(4, 500, 48, torch.float32, device)
    weight[450] = weight[2]  # a tie across shards
    x[0] = weight[2] * 10
    d2t = torch.arange(500, device=device) + 3
    bounds = [0, 130, 133, 133, 500]  # one shard with fewer than k rows, one empty
    parts = [
        local_topk(x, weight[a:b], 6, vocab_start=a, logit_scale=2.0, backend=backend)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    assert [p.ids.shape[1] for p in parts] == [6, 3, 0, 6]
    merged = merge_topk(parts, 6, d2t=d2t, backend=backend)
    whole = head_topk(x, weight, 6, d2t=d2t, logit_scale=2.0, backend=backend)
    assert merged.draft_ids[0, :2].tolist() == [2, 450]
    assert torch.equal(merged.ids, whole.ids)
    assert torch.equal(merged.draft_ids, whole.draft_ids)
    torch.testing.assert_close(merged.logits, whole.logits)
    torch.testing.assert_close(merged.lse, whole.lse)
    padded = parts[1]._replace(
        logits=torch.nn.functional.pad(parts[1].logits, (0, 3), value=float("-inf")),
        draft_ids=torch.nn.functional.pad(parts[1].draft_ids, (0, 3)),
    )
    assert torch.equal(merge_topk([parts[0], padded, *parts[2:]], 6, d2t=d2t, backend=backend).ids, whole.ids)
    with pytest.raises(ValueError, match="k=4 exceeds the 3 candidates"):
        merge_topk(parts[1:3], 4, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_fp8(backend, dtype, device):
    x, weight = make(5, 260, 70, dtype, device)
    w8, scale = quant_fp8(weight)
    rounded = (w8.float() * scale[:, None]).to(dtype)
    out = head_topk(x, w8, 4, logit_scale=0.5, weight_scale=scale, backend=backend)
    check(out, x, rounded, 4, scale=0.5)
    with pytest.raises(
        ValueError, match=r"float8_e4m3fn with \[260\] scales, found torch.float8_e4m3fn, \(3,\)"
    ):
        head_topk(x, w8, 4, weight_scale=scale[:3], backend=backend)
    with pytest.raises(ValueError, match="share a dtype"):
        head_topk(x, w8, 4, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_rank_finds_the_top_of_all(backend, device):
    x, weight = make(4, 300, 80, torch.float32, device)
    d2t = torch.arange(300, device=device) * 2
    bounds = [0, 100, 103, 103, 300]  # one rank has fewer than k rows, one has none
    whole = head_topk(x, weight, 5, d2t=d2t, logit_scale=0.5, backend=backend)
    sent = []

    def top(rank, gather):
        a, b = bounds[rank : rank + 2]
        return sharded_topk(
            x, weight[a:b], 5, vocab_start=a, gather=gather, d2t=d2t, logit_scale=0.5, backend=backend
        )

    def send(own):
        sent.append(own)
        return own.repeat(1, 4)

    for rank in range(4):
        top(rank, send)
    assert {tuple(own.shape) for own in sent} == {(4, 11)}
    for rank in (0, 2):
        found = top(rank, lambda own: torch.cat(sent, dim=1))
        assert torch.equal(found.ids, whole.ids) and torch.equal(found.draft_ids, whole.draft_ids)
        torch.testing.assert_close(found.logits, whole.logits)
        torch.testing.assert_close(found.lse, whole.lse)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(1, 20),
    vocab=st.integers(12, 700),
    h=st.integers(2, 150),
    k=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(n, vocab, h, k, dtype, device):
    x, weight = make(n, vocab, h, dtype, device)
    logits = x.double() @ weight.double().T
    out = head_topk(x, weight, k, backend="triton")
    assert_near(out.logits.to(dtype), logits.topk(k).values)
    assert_near(logits.gather(1, out.draft_ids).to(dtype), logits.topk(k).values)
    torch.testing.assert_close(out.lse.double(), logits.logsumexp(1), rtol=0, atol=4 * TOLERANCE[dtype])


@given(
    st.lists(
        st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**31 - 1)),
        min_size=2,
        max_size=2,
        unique_by=lambda pair: pair[1],
    )
)
def test_keys_order_logits_then_ids(pairs):
    (a, i), (b, j) = pairs
    logits, ids = torch.tensor([a, b], dtype=torch.float32), torch.tensor([i, j])
    keys = pack_keys(logits, ids)
    a, b = logits.tolist()
    assert (keys[0] > keys[1]).item() == ((a > b) or (a == b and i < j))
    back, back_ids = unpack_keys(keys)
    assert torch.equal(back, logits) and torch.equal(back_ids, ids)


def test_bad_arguments_name_what_was_found():
    x, weight = make(2, 30, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"k must be in 1..30 .*found 31"):
        head_topk(x, weight, 31)
    with pytest.raises(ValueError, match=r"k must be in 1..30 .*found 0"):
        head_topk(x, weight, 0)
    with pytest.raises(ValueError, match=r"d2t must be int64 \[30\], found torch.int32 \(30,\)"):
        head_topk(x, weight, 1, d2t=torch.zeros(30, dtype=torch.int32))
    with pytest.raises(ValueError, match="share a dtype"):
        head_topk(x.half(), weight, 1)
    with pytest.raises(ValueError, match=r"found \(2, 8\) and \(30, 7\)"):
        head_topk(x, weight[:, :7], 1)
    with pytest.raises(ValueError, match="at most 64"):
        head_topk(x, torch.zeros(100, 8), 65)
