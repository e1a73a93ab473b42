"""EAGLE-3 decoding in plain transformers and torch, one sequence at a time. The tests compare the engine with it.

Sources: arXiv 2503.01840, section 3.1 (drafting from the target's low, mid and high states); EAGLE-2,
arXiv 2406.16858, section 4 (expansion and reranking of the tree). A chain is a tree in which every node has
one child, so the same verification serves both. A graft adds a branch to either: a copy of the tokens that
followed an earlier occurrence of the text's newest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vllm_eagle3.reference.draft import KV, DraftModel


@dataclass(frozen=True)
class Tree:
    """A draft. Node 0 is the root, the last token of the text; a parent comes before its children.

    tokens: target ids of the nodes; parents: index of each node's parent, -1 for the root. Only for drawn drafts
    (`reference/sampled.py`), by node: `drawn`, its children in the order of drawing, without replacement, and `q`,
    the distribution [vocab] that they were drawn from.
    """

    tokens: list[int]
    parents: list[int]
    q: dict[int, Tensor] = field(default_factory=dict)
    drawn: frozenset[int] = frozenset()

    @property
    def depths(self) -> list[int]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def visible(self) -> Tensor:
        """The mask, bool [nodes, nodes]: a node reads itself and its ancestors, which include the root."""
        mask = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask


@dataclass
class Decoded:
    """The answer with its stop token, and how many drafted tokens each verification read and accepted.

    The root does not count as a drafted token.
    """

    tokens: list[int]
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)


# A proposer grows a tree from the text's last token: (draft, a of the last row [1, h], the draft's KV, the text).
# That row belongs to the token before the last, so its position is len(text) - 2.
Proposer = Callable[[DraftModel, Tensor, KV, list[int]], Tree]
# A rule of verification: (tree, the target's logits at each node, temperature, noise) -> path and next token
Verifier = Callable[[Tree, Tensor, float, torch.Generator | None], tuple[list[int], int]]


def chain(num_speculative_tokens: int) -> Proposer:
    """A chain: each step takes the draft's most likely token, and the next step reads this step's output as its g."""

    def propose(draft: DraftModel, a: Tensor, kv: KV, text: list[int]) -> Tree:
        position, tokens = len(text) - 2, text[-1:]
        for step in range(num_speculative_tokens):
            if step:
                token = torch.tensor(tokens[-1:], device=a.device)
                positions = torch.tensor([position + step], device=a.device)
                a, kv = draft.layer(draft.embed(token), draft.next_g(a), positions, kv)
            tokens.append(int(draft.draft_to_target(draft.logits(a).argmax(-1))))
        return Tree(tokens, list(range(-1, num_speculative_tokens)))

    return propose


def eagle2_tree(depth: int, topk: int, nodes: int) -> Proposer:
    """EAGLE-2's dynamic tree of `depth` levels.

    A node's value is the product of the draft's confidences along its path. Expansion: the `topk` candidates of
    highest value in each level get `topk` children each. Reranking: the `nodes` candidates of highest value among
    all levels are kept. A child's value never exceeds its parent's, and ties go to the earlier candidate. So the
    kept nodes are connected, and a parent comes before its children.
    """

    def propose(draft: DraftModel, a: Tensor, kv: KV, text: list[int]) -> Tree:
        position, past = len(text) - 2, kv[0].shape[0]
        k = min(topk, draft.config.draft_vocab_size)
        # candidates of all levels, in order: token, log value, parent (candidate index, -1 = root)
        tokens, parents = a.new_empty(0, dtype=torch.long), a.new_empty(0, dtype=torch.long)
        values = a.new_empty(0, dtype=torch.float)
        rows = torch.tensor([-1], device=a.device)  # candidate of each row of `a`
        seen = torch.zeros(1, 0, dtype=torch.bool, device=a.device)  # this tree's KV, read by row
        for level in range(1, depth + 1):
            confidence, ids = draft.logits(a).float().log_softmax(-1).topk(k)  # [rows, k]
            value = confidence + (values[rows][:, None] if level > 1 else 0)
            first = len(tokens)
            tokens = torch.cat([tokens, draft.draft_to_target(ids).flatten()])
            values = torch.cat([values, value.flatten()])
            parents = torch.cat([parents, rows.repeat_interleave(k)])
            if level == depth:
                break
            best = value.flatten().sort(descending=True, stable=True).indices[:k]  # expand these
            of = best // k  # their parents' rows of `a`
            seen = torch.cat([seen[of], torch.eye(len(best), dtype=torch.bool, device=a.device)], 1)
            mask = torch.cat([seen.new_ones(len(best), past), seen], 1)
            rows = first + best
            positions = torch.full_like(rows, position + level)
            a, kv = draft.layer(draft.embed(tokens[rows]), draft.next_g(a[of]), positions, kv, mask)
        keep = values.sort(descending=True, stable=True).indices[:nodes].tolist()  # rerank: best first
        place = {-1: 0} | {candidate: node for node, candidate in enumerate(keep, 1)}
        return Tree([text[-1], *tokens[keep].tolist()], [-1, *(place[p] for p in parents[keep].tolist())])

    return propose


def look_up(text: list[int], length: int, min_match: int, max_match: int) -> list[int]:
    """The `length` tokens that followed an earlier occurrence of the text's newest tokens; empty if there is none.

    The longest match wins (`min_match` to `max_match` tokens), then the latest. Tokens are copied one by one, so that
    a text that repeats itself is continued by the same repetition.
    """
    longest, place = min_match - 1, None
    for end in range(1, len(text)):  # the earlier place is text[:end]
        match = 0
        while match < min(end, max_match) and text[end - 1 - match] == text[-1 - match]:
            match += 1
        if match >= max(longest, min_match):
            longest, place = match, end
    if place is None:
        return []
    copied = list(text)
    for i in range(length):
        copied.append(copied[place + i])
    return copied[len(text) :]


def grafted(
    propose: Proposer, length: int = 8, min_match: int = 2, max_match: int = 8, places: int | None = None
) -> Proposer:
    """A proposer that adds the looked-up continuation to the draft of `propose`, as a branch that begins at the root.

    The continuation's nodes come first. The draft's nodes follow, best first, without those whose path the
    continuation already has. Only the first `places` nodes are kept, so the graft replaces the draft's least likely
    nodes.
    """

    def with_graft(draft: DraftModel, a: Tensor, kv: KV, text: list[int]) -> Tree:
        tree, continuation = propose(draft, a, kv, text), look_up(text, length, min_match, max_match)[:places]
        tokens, parents = [text[-1], *continuation], list(range(-1, len(continuation)))
        number = {0: 0}  # node of the draft -> its number in the result
        for node, parent in list(enumerate(tree.parents))[1:]:
            above = number.get(parent, len(tokens))
            if above < len(continuation) and continuation[above] == tree.tokens[node]:
                number[node] = above + 1
            elif above < len(tokens) and (places is None or len(tokens) <= places):
                number[node] = len(tokens)
                tokens.append(tree.tokens[node])
                parents.append(above)
        q = {number[node]: q for node, q in tree.q.items() if node in number}
        drawn = {number[node] for node in tree.drawn if node in number}
        return Tree(tokens, parents, q, frozenset(drawn - set(range(len(continuation) + 1))))

    return with_graft


class CachedTarget:
    """A causal language model of transformers with its KV cache. Id k in `aux_layers` is the state after k layers."""

    def __init__(self, model: Any, aux_layers: tuple[int, ...]) -> None:
        layers = model.config.num_hidden_layers
        if not all(0 <= k <= layers for k in aux_layers):
            raise ValueError(f"aux_layers: expected ids from 0 to {layers}, found {aux_layers}")
        self.model, self.aux_layers, self.cache = model, aux_layers, DynamicCache(config=model.config)

    def __call__(self, tree: Tree, past: int, logits_to_keep: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Run the nodes after `past` cached tokens.

        Returns logits [nodes, vocab] (only the last `logits_to_keep` rows if given) and aux states, each [nodes, ht].
        """
        device = self.model.device
        mask = torch.cat([torch.ones(len(tree.tokens), past, dtype=torch.bool), tree.visible()], 1)
        forbidden = torch.finfo(self.model.dtype).min
        additive = torch.zeros(mask.shape, dtype=self.model.dtype).masked_fill(~mask, forbidden)
        # The last of transformers' hidden_states is normed. This is the state before the norm.
        top: list[Tensor] = []
        last_layer = self.model.get_decoder().layers[-1]
        hook = last_layer.register_forward_hook(lambda module, args, output: top.append(output))
        out = self.model(
            torch.tensor([tree.tokens], device=device),
            position_ids=torch.tensor([tree.depths], device=device) + past,
            attention_mask=additive[None, None].to(device),
            past_key_values=self.cache,
            output_hidden_states=True,
            logits_to_keep=logits_to_keep,
        )
        hook.remove()
        states = [*out.hidden_states[:-1], top[0]]
        return out.logits[0], [states[k][0] for k in self.aux_layers]

    def keep(self, past: int, path: list[int]) -> None:
        """Keep the KV of the `past` tokens and, after it, that of the accepted path. Drop all other nodes."""
        slots = torch.tensor([*range(past), *(past + node for node in path)], device=self.model.device)
        layer: Any
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, slots], layer.values[:, :, slots]


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """One token drawn from the target's distribution [vocab]; the most likely one at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator))


def accept(
    tree: Tree, logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[list[int], int]:
    """The accepted path, root first, and the token after it.

    At each node a token is drawn from the target; a child that carries it is accepted, else the path ends.
    So each token of the text is a draw from the target, whatever was drafted, and the output's distribution is the
    target's at any temperature.
    """
    path = [0]
    while True:
        token = draw(logits[path[-1]], temperature, generator)
        children = [node for node, parent in enumerate(tree.parents) if parent == path[-1]]
        match = next((child for child in children if tree.tokens[child] == token), None)
        if match is None:
            return path, token
        path.append(match)


@torch.inference_mode()
def decode(
    model: Any,
    draft: DraftModel,
    prompt: list[int],
    propose: Proposer,
    max_tokens: int,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    verify: Verifier = accept,
) -> Decoded:
    """Answer `prompt` (token ids) with at most `max_tokens` tokens, up to and including the first token in `stop`.

    `model` is an AutoModelForCausalLM. All tokens that the last verification accepts are counted, as in vLLM,
    although some of them may lie beyond the end of the answer.
    Raises ValueError on an empty prompt or an aux layer the target lacks.
    """
    if not prompt or max_tokens < 1:
        found = f"{len(prompt)} tokens and max_tokens {max_tokens}"
        raise ValueError(f"expected a prompt and max_tokens >= 1, found {found}")
    target, past = CachedTarget(model, draft.config.aux_layers), len(prompt)
    logits, states = target(Tree(prompt, list(range(-1, past - 1))), 0, logits_to_keep=1)
    new = [draw(logits[-1], temperature, generator)]
    answer = Decoded(new)
    following, rows, kv = [*prompt[1:], *new], list(range(past)), None
    while len(answer.tokens) < max_tokens and not set(new) & set(stop):
        # the draft reads each new row of the target: state at position p, embedding of the token at p + 1
        g = draft.fuse([state[rows] for state in states])
        positions = torch.arange(past - len(rows), past, device=g.device)
        a, kv = draft.layer(draft.embed(torch.tensor(following, device=g.device)), g, positions, kv)
        tree = propose(draft, a[-1:], kv, prompt + answer.tokens)

        logits, states = target(tree, past)
        rows, token = verify(tree, logits, temperature, generator)
        target.keep(past, rows)
        following = new = [*(tree.tokens[node] for node in rows[1:]), token]
        past += len(rows)
        answer.tokens = answer.tokens + new
        answer.accepted.append(len(new) - 1)
        answer.drafted.append(len(tree.tokens) - 1)
    end = next((i for i, token in enumerate(answer.tokens, 1) if token in stop), max_tokens)
    return Decoded(answer.tokens[: min(end, max_tokens)], answer.accepted, answer.drafted)
