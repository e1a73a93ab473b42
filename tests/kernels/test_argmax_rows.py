"""The argmax of rows on a CPU equals torch's: ties, signed zeros, infinities, NaN, strided rows (2 s)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.kernels.argmax_rows import argmax_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31), st.integers(0, 5), st.sampled_from([1, 2, 1023, 1024, 1025, 5000]),
    st.sampled_from(DTYPES), st.integers(0, 3),
)  # fmt: skip
def test_as_torch(seed, rows, vocab, dtype, padding):
    g = torch.Generator().manual_seed(seed)
    few = torch.tensor([0.0, -0.0, 1.5, 1.5, -2.0, torch.inf, -torch.inf])[
        : int(torch.randint(1, 8, (), generator=g))
    ]
    normal = torch.randn(rows, vocab + padding, generator=g)
    tied = few[torch.randint(0, len(few), normal.shape, generator=g)]
    for values in (normal, tied, torch.full_like(normal, -torch.inf)):
        logits = values.to(dtype)[:, :vocab]
        assert torch.equal(argmax_rows(logits), logits.float().argmax(dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_the_largest(dtype):
    logits = torch.zeros(2, 3000, dtype=dtype)
    logits[0, 2500] = torch.nan
    logits[1, 7] = 3.0
    assert argmax_rows(logits).tolist() == [2500, 7]


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float64"):
        argmax_rows(torch.zeros(1, 4, dtype=torch.float64))
