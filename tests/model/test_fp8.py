"""Draft layers that read fp8 weights: on a CPU by the kernels' plain form, eagerly and compiled. 10 s."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_eagle3.kernels import MOST_ROWS, quant_fp8
from vllm_eagle3.model import fp8


class Linear(torch.nn.Module):
    """As vLLM's linear layers."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(48, 32, dtype=torch.bfloat16), requires_grad=False)
        self.bias = torch.randn(48, dtype=torch.bfloat16) if bias else None
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_of_few_rows_read_rounded_weights(bias, compiled):
    torch.manual_seed(0)
    layer = Linear(bias)
    w8, scale = quant_fp8(layer.weight.data)
    rounded = (w8.float() * scale[:, None]).to(torch.bfloat16)
    fp8.read_in_fp8([layer])
    forward = torch.compile(layer, backend="eager", dynamic=True, fullgraph=True) if compiled else layer
    for rows in (3, MOST_ROWS, MOST_ROWS + 1, 200):
        x = torch.randn(rows, 32, dtype=torch.bfloat16)
        expected = F.linear(x, rounded if rows <= MOST_ROWS else layer.weight, layer.bias)
        other = F.linear(x, layer.weight if rows <= MOST_ROWS else rounded, layer.bias)
        out = forward(x)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.05)
        assert (out - expected).norm() < 0.5 * (out - other).norm()


def test_quantised_layers_stay_as_they_are():
    layer = Linear(False)
    layer.quant_method = SimpleNamespace()
    before = layer.quant_method
    fp8.read_in_fp8([layer])
    assert layer.quant_method is before


def test_a_cpu_says_that_it_has_no_fp8(caplog):
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, "vllm.eagle3"):
        assert not fp8.fp8_works(torch.device("cpu"))
    assert "fp8_draft is ignored" in caplog.text and "8.9" in caplog.text
