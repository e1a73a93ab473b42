"""norm_concat: kernel and torch twin against the formula in fp64. About 3 s interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import DTYPES, assert_near, randn, rms_norm64, strided

from vllm_eagle3.kernels import norm_concat

BACKENDS = ["triton", "torch"]
EPS = 1e-5


def make(n, h, dtype, device):
    e, g = (randn(n, h, dtype=dtype, device=device, seed=i) for i in (0, 1))
    w_in, w_hidden = (1 + randn(h, dtype=dtype, device=device, seed=i) / 4 for i in (2, 3))
    return e, g, w_in, w_hidden


def expected_x(e, g, w_in, w_hidden):
    return torch.cat([rms_norm64(e, w_in, EPS), rms_norm64(g, w_hidden, EPS)], 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "h"), [(5, 123), (1, 577), (0, 64), (3, 5)])
def test_side_by_side(backend, dtype, n, h, device):
    e, g, w_in, w_hidden = make(n, h, dtype, device)
    x, residual = norm_concat(e, g, w_in, w_hidden, eps=EPS, backend=backend)
    assert residual is None
    assert_near(x, expected_x(e, g, w_in, w_hidden))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_lookup_and_gather(backend, index_dtype, device):
    table, g, w_in, w_hidden = make(50, 123, torch.float32, device)
    ids = torch.tensor([49, 0, 7, 7], dtype=index_dtype, device=device)
    g_rows = torch.tensor([2, 2, 40, 0], dtype=index_dtype, device=device)
    x, _ = norm_concat(
        strided(table), strided(g), w_in, w_hidden, ids=ids, g_rows=g_rows, eps=EPS, backend=backend
    )
    assert_near(x, expected_x(table[ids.long()], g[g_rows.long()], w_in, w_hidden))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_outside_the_table_are_clamped(backend, device):
    table, g, w_in, w_hidden = make(4, 33, torch.float32, device)
    ids = torch.tensor([-1, 3, 4, 2**31 - 1], device=device)
    x, _ = norm_concat(table, g, w_in, w_hidden, ids=ids, eps=EPS, backend=backend)
    assert_near(x, expected_x(table[[0, 3, 3, 3]], g, w_in, w_hidden))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_is_g_after_or_before_its_norm(backend, normed, dtype, device):
    e, g, w_in, w_hidden = make(5, 123, dtype, device)
    rows = torch.tensor([4, 1, 1, 0, 3], device=device)
    x, residual = norm_concat(
        e, g, w_in, w_hidden, g_rows=rows, eps=EPS, norm_before_residual=normed, backend=backend
    )
    assert residual.is_contiguous()
    assert torch.equal(residual, x[:, 123:] if normed else g[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_half_of_its_row(backend, device):
    e, g, w_in, w_hidden = make(3, 20, torch.bfloat16, device)
    g[1, 7] = float("nan")
    x, _ = norm_concat(e, g, w_in, w_hidden, eps=EPS, backend=backend)
    assert x[1, 20:].isnan().all()
    assert x.isnan().sum() == 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_fp16_values_do_not_overflow(backend, device):
    e, g, w_in, w_hidden = make(2, 64, torch.float16, device)
    x, _ = norm_concat(e, g * 8000, w_in, w_hidden, eps=EPS, backend=backend)
    assert_near(x, expected_x(e, g * 8000, w_in, w_hidden))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(n=st.integers(1, 9), h=st.integers(2, 700), dtype=st.sampled_from(DTYPES))
def test_any_shape(n, h, dtype, device):
    e, g, w_in, w_hidden = make(n, h, dtype, device)
    x, _ = norm_concat(e, g, w_in, w_hidden, eps=EPS, backend="triton")
    assert_near(x, expected_x(e, g, w_in, w_hidden))


def test_bad_arguments_name_what_was_found():
    e, g, w_in, w_hidden = make(4, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match="equally wide"):
        norm_concat(e[:, :7], g, w_in, w_hidden)
    with pytest.raises(ValueError, match=r"w_in must be \[8\], found \(7,\)"):
        norm_concat(e, g, w_in[:7], w_hidden)
    with pytest.raises(ValueError, match="share a dtype"):
        norm_concat(e, g.half(), w_in, w_hidden)
    with pytest.raises(ValueError, match="3 embedding rows do not match 4"):
        norm_concat(e, g, w_in, w_hidden, ids=torch.arange(3))
    with pytest.raises(ValueError, match="g_rows must be"):
        norm_concat(e, g, w_in, w_hidden, g_rows=torch.zeros(4))
