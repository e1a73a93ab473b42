"""concat_fc: split-K kernel and torch twin against the formula in fp64. About 15 s interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import DTYPES, assert_near, randn, rms_norm64, strided

from vllm_eagle3.kernels import concat_fc
from vllm_eagle3.kernels.skinny_gemm import split_k_config

BACKENDS = ["triton", "torch"]
EPS = 1e-5


def expected_fc(states, weight, norm_weights=None, input_norm=None):
    if norm_weights is not None:
        states = [rms_norm64(x, w, EPS) for x, w in zip(states, norm_weights, strict=True)]
    x = torch.cat([x.double() for x in states], 1)
    if input_norm is not None:
        x = rms_norm64(x, input_norm, EPS)
    return x @ weight.double().T


def make(n, h, widths, dtype, device):
    states = [randn(n, w, dtype=dtype, device=device, seed=i) for i, w in enumerate(widths)]
    weight = randn(h, sum(widths), dtype=dtype, device=device, seed=9) / sum(widths) ** 0.5
    return states, weight.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["none", "per_chunk", "whole"])
def test_odd_sizes_and_norms(backend, dtype, norm, device):
    widths = (5, 123, 577)
    states, weight = make(7, 123, widths, dtype, device)
    w = 1 + randn(sum(widths), dtype=dtype, device=device, seed=5) / 4
    extra = {"none": {}, "per_chunk": {"norm_weights": list(w.split(widths))}, "whole": {"input_norm": w}}[
        norm
    ]
    out = concat_fc(states, weight, eps=EPS, backend=backend, **extra)
    assert out.dtype == dtype
    assert_near(out, expected_fc(states, weight, **extra))


@pytest.mark.parametrize("n", [0, 1, 16, 17, 33, 65])
def test_row_counts(n, device):
    states, weight = make(n, 40, (64, 64, 64), torch.float32, device)
    assert_near(concat_fc(states, weight, backend="triton"), expected_fc(states, weight))


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_number_of_chunks(chunks, device):
    states, weight = make(3, 70, (48, 96, 16, 200, 31)[:chunks], torch.float32, device)
    assert_near(concat_fc(states, weight, backend="triton"), expected_fc(states, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_states_and_weight(dtype, device):
    states, weight = make(5, 65, (123, 64), dtype, device)
    out = concat_fc([strided(x) for x in states], strided(weight), backend="triton")
    assert_near(out, expected_fc(states, weight))


def test_narrow_chunk_is_split_along_its_inner_dimension(device):
    states, weight = make(2, 64, (576, 576, 576), torch.float32, device)
    assert split_k_config(2, 64, (576,) * 3, sms=132).splits > 1
    assert_near(concat_fc(states, weight, backend="triton"), expected_fc(states, weight))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_their_row_only(backend, bad, device):
    states, weight = make(4, 20, (33, 65), torch.float32, device)
    clean = concat_fc(states, weight, backend=backend)
    states[1][2, 64] = bad
    out = concat_fc(states, weight, backend=backend)
    keep = [0, 1, 3]
    assert torch.equal(out[keep], clean[keep])
    assert not out[2].isfinite().any()


def test_repeats_bit_for_bit(device):
    states, weight = make(3, 130, (577, 577), torch.float16, device)
    first = concat_fc(states, weight, backend="triton")
    assert torch.equal(first, concat_fc(states, weight, backend="triton"))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    n=st.integers(1, 40),
    h=st.integers(1, 150),
    widths=st.lists(st.integers(2, 200), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(n, h, widths, dtype, device):
    states, weight = make(n, h, widths, dtype, device)
    assert_near(concat_fc(states, weight, backend="triton"), expected_fc(states, weight))


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 4096),
    h=st.integers(1, 16384),
    widths=st.lists(st.integers(1, 16384), min_size=1, max_size=6),
    sms=st.integers(1, 160),
    fp32=st.booleans(),
)
def test_config_is_sane(n, h, widths, sms, fp32):
    cfg = split_k_config(n, h, widths, sms, fp32)
    assert cfg.block_m in (16, 32, 64) and cfg.block_m >= min(n, 64)
    assert cfg.splits >= 1
    assert cfg.splits == 1 or min(widths) // cfg.splits >= 2 * cfg.block_k
    tile_bytes = (cfg.block_m + cfg.block_n) * cfg.block_k * (4 if fp32 else 2)
    assert tile_bytes * cfg.num_stages <= 227 * 1024


def test_bad_arguments_name_what_was_found():
    states, weight = make(4, 8, (6, 10), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"\[h, 16\].*found \(8, 15\)"):
        concat_fc(states, weight[:, :15])
    with pytest.raises(ValueError, match="equal numbers of rows"):
        concat_fc([states[0], states[1][:2]], weight)
    with pytest.raises(ValueError, match="share a dtype"):
        concat_fc(states, weight.half())
    with pytest.raises(ValueError, match="adjacent in memory"):
        concat_fc(states, weight.T.contiguous().T)
    with pytest.raises(ValueError, match="not both"):
        concat_fc(states, weight, norm_weights=[weight[0, :6], weight[0, :10]], input_norm=weight[0])
    with pytest.raises(ValueError, match=r"sizes \[6, 10\], found \[6, 9\]"):
        concat_fc(states, weight, norm_weights=[weight[0, :6], weight[0, :9]])
    with pytest.raises(ValueError, match="backend must be"):
        concat_fc(states, weight, backend="cuda")
