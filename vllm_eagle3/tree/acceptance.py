"""The acceptance rule of draft trees. Nodes are numbered as in `tree.growth.Tree`; node 0 is the root."""

import torch

from vllm_eagle3.kernels import tree_walk


def accept(
    parents: torch.Tensor, tokens: torch.Tensor, drawn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The path that the target accepts, and the tokens that it emits.

    The rule, at every temperature: at a node, x is the token that the target draws after the path to that node
    (at temperature 0 its argmax). If a child carries x, emit x and go to that child; otherwise emit x and stop.
    Each emitted token is a draw from the target, so the output has the same distribution as without speculation.
    One of a node's children is accepted with the sum of their target probabilities. No rule accepts more, as long as
    the children are not drawn at random.

    Args:
        parents: int64 [batch, nodes], -1 for unused nodes (never reached); column 0 is ignored.
        tokens: int64 [batch, nodes], the token of each node; -1 matches nothing; column 0 is ignored.
        drawn: int64 [batch, nodes], the target's draw at each node.

    Returns:
        path: int64 [batch, nodes], the accepted node at each depth; after the last accepted one, entry i is i.
        emitted: int64 [batch, nodes], of which the first `count` are valid.
        count: int32 [batch], number of emitted tokens: the accepted drafts and one more.
    """
    path, accepted = tree_walk(parents, tokens, drawn)
    path = path.long()
    return path, drawn.gather(1, path), accepted + 1
