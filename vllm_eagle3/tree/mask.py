"""Which keys each row of a mixed batch may see while trees are verified; see `kernels.tree_attention`."""

from typing import NamedTuple

import torch


class TreeMask(NamedTuple):
    """A row sees key k of its request iff k < root or bit (k - root) of bits is set. All are int64 [tokens].

    A row that belongs to no tree is the root of its own tree: root is its position, bits is 1.
    """

    root: torch.Tensor  # position of the tree's root in the sequence
    bits: torch.Tensor  # bit j: node j of the tree
    positions: torch.Tensor  # root + depth, the position that the model uses

    def fill(
        self,
        linear: torch.Tensor,
        rows: torch.Tensor,
        used: torch.Tensor,
        depth: torch.Tensor,
        bits: torch.Tensor,
    ) -> None:
        """Write the mask of a step in place.

        linear: int64 [tokens], position of each row's slot. rows: int64 [batch, nodes], row of each node; where
        `used` (bool, same shape) is False it is the root's row. depth, bits: [batch, nodes].
        """
        self.root.copy_(linear)
        self.positions.copy_(linear)
        self.bits.fill_(1)
        root_position = linear[rows[:, :1]]
        self.root[rows] = root_position.expand_as(rows)
        self.positions[rows] = root_position + torch.where(used, depth, 0)
        # Entries that repeat the root's row all write the same values.
        self.bits[rows] = torch.where(used, bits, 1)
