"""Draft trees whose nodes are drawn from the draft's own distribution q, and the rule that verifies them.

A draft x that was not drawn is accepted with probability p(x), the target's. One that was drawn from q is accepted with
min(1, p(x) / q(x)); over all x that sums to the overlap of p and q. `reference/sampled.py` has the same rules for one
sequence.
Sources: SpecInfer, arXiv 2305.09781; SpecTr, 2310.15141.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_eagle3.kernels import top_k


class Children(NamedTuple):
    """k children of each of n nodes."""

    log_probs: Tensor  # float32 [n, k], log q of each
    ids: Tensor  # int64 [n, k], ids of the draft's vocabulary
    places: (
        Tensor  # float32 [n, k], log of the part of q that was left before each draw: what a child is kept by
    )
    q: Tensor  # [n, draft_vocab], the distribution that they were drawn from


def draw_children(
    logits: Tensor, temperature: Tensor, drawn: Tensor, k: int, dtype: torch.dtype = torch.float32
) -> Children:
    """Draw k children without replacement: the k largest of log q + Gumbel noise.

    Args:
        logits: [n, draft_vocab] of the draft.
        temperature: float [n], only used for drawn nodes.
        drawn: bool [n]. Other nodes get their k likeliest children, and the value of a place is the child's own.
        k: children of each node.
        dtype: the dtype of q, to which it is rounded before the draws.
    """
    scale = torch.where(drawn, temperature, 1.0)[:, None]
    q = (logits.float() / scale).softmax(dim=-1).to(dtype)
    log_q = q.float().log()
    log_q = log_q - log_q.logsumexp(dim=-1, keepdim=True)
    noise = -torch.empty_like(log_q).exponential_().log()
    _, ids = top_k(torch.where(drawn[:, None], log_q + noise, log_q), k)
    log_probs = log_q.gather(1, ids)
    probs = log_probs.exp()
    left = (1 - probs.cumsum(1) + probs).clamp(min=0).log()
    places = torch.where(drawn[:, None], torch.maximum(left, log_probs), log_probs)
    places = torch.where(torch.isneginf(log_probs), log_probs, places)  # q has no more tokens to draw
    return Children(log_probs, ids, places, q)


class DrawnTrees(NamedTuple):
    """What verification needs to know of drawn trees in addition to their tokens and parents."""

    q: Tensor  # [batch, expansions, draft_vocab]
    expanded: Tensor  # int64 [batch, nodes + 1], expansion of a node's drawn children, -1 for none
    given: Tensor  # int64 [batch], a graft's nodes: the first ones, which were not drawn; nor were children of `-1`
    draft_ids: Tensor  # int64 [vocab], id of each token in the draft's vocabulary, -1 for none
    target_ids: Tensor  # int64 [draft_vocab]


def accept_drawn(
    parents: Tensor, tokens: Tensor, logits: Tensor, rows: Tensor, trees: DrawnTrees
) -> tuple[Tensor, Tensor, Tensor]:
    """Recursive rejection. Returns path, emitted and count as `tree.acceptance.accept`.

    A node's children are tried in turn: each is accepted with probability min(1, p(x) / q(x)), a graft's with p(x).
    After a refusal p becomes the residual norm(max(p - q, 0)), and the refused token is removed from q. If no child is
    accepted, the next token is drawn from the last residual.

    Args:
        parents: int64 [batch, nodes + 1] as in `accept`.
        tokens: the same.
        logits: [any, vocab] of the target, with all sampling parameters applied.
        rows: int64 [batch, nodes + 1], row of each node's logits.
        trees: how the trees were drawn.
    """
    batch, columns = parents.shape
    node_ids = torch.arange(columns, device=parents.device)
    path = node_ids.repeat(batch, 1)
    count = torch.zeros(batch, 1, dtype=torch.int64, device=parents.device)  # accepted drafts
    node, tried = torch.zeros_like(count), torch.zeros_like(count)

    def at(node: Tensor) -> tuple[Tensor, Tensor]:
        """p and q of a node, [batch, vocab] and [batch, draft_vocab]."""
        p = logits[rows.gather(1, node)[:, 0]].float().softmax(dim=-1)
        expansion = trees.expanded.gather(1, node)
        q = trees.q[torch.arange(batch, device=node.device), expansion[:, 0].clamp(min=0)].float()
        return p, q / q.sum(dim=-1, keepdim=True) * (expansion >= 0)

    p, q = at(node)
    for _ in range(columns - 1):
        candidates = (parents == node) & (tokens >= 0) & (node_ids > tried)
        found = candidates.any(dim=1, keepdim=True)
        if parents.device.type == "cpu" and not found.any():
            break
        child = candidates.int().argmax(dim=1, keepdim=True)
        token = torch.where(found, tokens.gather(1, child), 0)
        draft_id = trees.draft_ids[token]
        given = (child <= trees.given[:, None]) | (trees.expanded.gather(1, node) < 0)
        of_token = torch.where(draft_id >= 0, q.gather(1, draft_id.clamp(min=0)), 0.0)
        chance = p.gather(1, token) / torch.where(given, 1.0, of_token)
        accepted = found & (torch.rand_like(chance) < chance)
        refused = found & ~accepted
        tried = torch.where(found, child, tried)
        node = torch.where(accepted, child, node)
        count = count + accepted
        path = torch.where(accepted & (node_ids == count), child, path)

        p_next, q_next = at(node)
        p_left, q_left = _after_refusal(p, q, token, draft_id, given, trees.target_ids)
        p = torch.where(accepted, p_next, torch.where(refused, p_left, p))
        q = torch.where(accepted, q_next, torch.where(refused, q_left, q))

    last = torch.multinomial(p, 1)
    emitted = tokens.gather(1, path.roll(-1, dims=1)).scatter(1, count, last)
    return path, emitted, (count[:, 0] + 1).int()


def _after_refusal(
    p: Tensor, q: Tensor, token: Tensor, draft_id: Tensor, given: Tensor, target_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual of p, and q without the refused token. If rounding leaves no residual, p does not change."""
    residual = p.index_add(1, target_ids, -torch.where(given, 0.0, q))
    residual.scatter_add_(1, token, -given.to(residual.dtype))
    residual = residual.clamp_(min=0)
    total = residual.sum(dim=-1, keepdim=True)
    q_left = q.scatter(1, draft_id.clamp(min=0), torch.where(draft_id >= 0, 0.0, q[:, :1]))
    q_left = q_left / q_left.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return torch.where(total > 0, residual / total, p), q_left
