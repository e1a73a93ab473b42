"""The acceptance rule of draft trees. Nodes are numbered as in `tree.growth.Tree`; node 0 is the root."""

import torch

from vllm_eagle3.kernels import tree_walk


def accept(
    parents: torch.Tensor, tokens: torch.Tensor, drawn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The path that the target accepts and what it emits.

    The rule, at every temperature: at a node, x is the target's own draw given the path to that node
    (its argmax at temperature 0). If a child carries x, go there; else emit x and stop. Every emitted
    token is a draw of the target's, so the output is distributed as without speculation; a set of
    children is accepted with the sum of their target probabilities, the best any rule can do for
    children that are not sampled.

    Args:
        parents: int64 [batch, nodes], -1 for unused nodes (never reached); column 0 is ignored.
        tokens: int64 [batch, nodes], what each node carries; -1 matches nothing; column 0 is ignored.
        drawn: int64 [batch, nodes], the target's draw at each node.

    Returns:
        path: int64 [batch, nodes], node at each depth; past the accepted ones entry i is i.
        emitted: int64 [batch, nodes], valid up to the count.
        count: int32 [batch], tokens emitted: the accepted drafts and one more.
    """
    path, accepted = tree_walk(parents, tokens, drawn)
    path = path.long()
    return path, drawn.gather(1, path), accepted + 1
