"""The mask of a mixed batch, in place (1 s)."""

import torch

from vllm_eagle3.kernels import ancestor_bits
from vllm_eagle3.tree.mask import TreeMask


def test_mask_of_a_mixed_batch():
    """A chunk of a prompt, then a tree of three nodes of which the scheduler cut the last, then padding."""
    depth, bits = ancestor_bits(torch.tensor([[-1, -1, -1, -1], [-1, 0, 0, 1]]))
    linear = torch.tensor([4, 5, 6, 20, 21, 22, 0, 0])
    rows = torch.tensor([[2, 2, 2, 2], [3, 4, 5, 3]])
    used = torch.tensor([[True, False, False, False], [True, True, True, False]])
    mask = TreeMask(*(torch.full((8,), 99) for _ in range(3)))
    mask.fill(linear, rows, used, depth, bits)
    assert mask.root.tolist() == [4, 5, 6, 20, 20, 20, 0, 0]
    assert mask.positions.tolist() == [4, 5, 6, 20, 21, 21, 0, 0]
    assert mask.bits.tolist() == [1, 1, 1, 1, 0b011, 0b101, 1, 1]
