"""quant_fp8 and linear_fp8: rounding bounds; kernel and twin against the product in fp64. About 2 s."""

from __future__ import annotations

import pytest
import torch
from reference import DTYPES, assert_near, randn

from vllm_eagle3.kernels import linear_fp8, quant_fp8


def test_quantization_keeps_three_mantissa_bits_of_each_row():
    weight = randn(40, 123, dtype=torch.bfloat16, device="cpu") * torch.logspace(-6, 6, 40)[:, None]
    weight[7] = 0
    w8, scale = quant_fp8(weight)
    back = w8.double() * scale.double()[:, None]
    top = weight.double().abs().amax(1, keepdim=True)
    # Half a unit in the last place of e4m3: relative 2^-4, or for subnormals 2^-10 / 448 of the row's largest.
    assert ((back - weight.double()).abs() <= weight.double().abs() / 16 + top * 2**-10 / 448 + 1e-30).all()
    assert torch.equal(back.abs().amax(1) > 0, weight.abs().amax(1) > 0) and scale[7] == 1


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "out", "inner"), [(5, 123, 577), (1, 64, 64), (0, 5, 5)])
def test_product(backend, dtype, n, out, inner, device):
    x = randn(n, inner, dtype=dtype, device=device)
    w8, scale = quant_fp8(randn(out, inner, dtype=torch.float32, device=device, seed=1) / inner**0.5)
    y = linear_fp8(x, w8, scale, backend=backend)
    assert y.dtype == dtype
    assert_near(y, x.double() @ (w8.double() * scale.double()[:, None]).T)


def test_bad_arguments_name_what_was_found():
    w8, scale = quant_fp8(torch.ones(4, 8))
    with pytest.raises(ValueError, match=r"found \(2, 7\) and \(4, 8\)"):
        linear_fp8(torch.ones(2, 7), w8, scale)
    with pytest.raises(ValueError, match="w8 must be float8_e4m3fn"):
        linear_fp8(torch.ones(2, 8), torch.ones(4, 8), scale)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quant_fp8(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"must be \[out, in\], found \(3,\)"):
        quant_fp8(torch.ones(3))
