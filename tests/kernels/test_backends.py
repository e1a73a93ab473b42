"""The choice of the backend, and imports without Triton (10 s, most of it importing torch in child processes)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vllm_eagle3.kernels._triton import choose_backend

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from vllm_eagle3 import kernels as k
assert not k.HAS_TRITON
x, w = torch.randn(2, 8), torch.randn(6, 16)
assert k.concat_fc([x, x], w).shape == (2, 6)
assert k.head_topk(x, torch.randn(9, 8), 3).ids.shape == (2, 3)
tree = torch.tensor([[0, 0, 1]])
assert k.tree_walk(tree, tree, tree)[1].shape == (1,)
assert k.ancestor_bits(tree)[0].tolist() == [[0, 1, 2]]
table = k.kv_table([torch.randn(2, 2, 4, 1, 8)])
k.commit_kv(table, tree, tree)
assert k.linear_fp8(x, *k.quant_fp8(torch.randn(3, 8))).shape == (2, 3)
try:
    k.concat_fc([x, x], w, backend="triton")
except ValueError as error:
    assert "needs the package triton" in str(error)
else:
    raise AssertionError("no error")
assert "vllm" not in sys.modules
"""


def test_torch_paths_need_neither_triton_nor_vllm():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_device_decides_and_an_explicit_backend_wins():
    x = torch.zeros(1)
    assert choose_backend(None, x, None) == "torch"
    assert choose_backend("torch", x) == "torch"
    with pytest.raises(ValueError, match="one device, found"):
        choose_backend(None, x, x.to("meta"))
    with pytest.raises(ValueError, match="found 'cuda'"):
        choose_backend("cuda", x)  # type: ignore[arg-type]
