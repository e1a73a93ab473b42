"""Does this draft fit this target? Compares first drafted tokens with the target's own, in plain transformers.

The states that a draft reads come from three layers of the target. If a checkpoint numbers them by another convention,
they are off by one. Nothing fails then, but the draft is worse. So the probe also reads one layer lower and one layer
higher.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_eagle3.reference.decode import CachedTarget, Tree
from vllm_eagle3.reference.draft import DraftModel, load_draft

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train leaves at 9:40 and arrives at 11:05. How long is the journey?",
    "Rewrite politely: send me the report now.",
)
TOKENS = 64
SIGNIFICANT = 0.03
"""A smaller difference in acceptance may be chance: with 4 * 64 tokens one standard error is about 0.03."""
POOR = 0.3
"""A draft that fits its target reaches more than this; a draft for another target is far below."""

Layers = tuple[int, ...]


@torch.inference_mode()
def probe(target: str, draft: str) -> dict[Layers, float]:
    """Share of first drafted tokens that equal the target's, by the layers that were read; the resolved ones first.

    Raises:
        CheckpointError: the draft is wrong or made for another target.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    model = model.to(device).eval()
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    plain = load_draft(draft, target=target, dtype=model.dtype, embeddings=embeddings, head=head).to(device)
    resolved, last = plain.config.aux_layers, model.config.get_text_config().num_hidden_layers
    triples = [tuple(k + shift for k in resolved) for shift in (0, -1, 1)]
    triples = [layers for layers in triples if min(layers) >= 0 and max(layers) <= last]
    hits, total = dict.fromkeys(triples, 0), 0
    for prompt in PROMPTS:
        ids = _chat(tokenizer, prompt)
        given = torch.tensor([ids], device=device)
        text = model.generate(given, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0].tolist()
        for layers in triples:
            found, total_here = agreement(model, plain, layers, text, len(ids))
            hits[layers] += found
        total += total_here
    return {layers: hits[layers] / total for layers in triples}


def agreement(model: Any, draft: DraftModel, layers: Layers, text: list[int], prompt: int) -> tuple[int, int]:
    """(drafted tokens that equal those of `text`, drafted tokens), for the answer after `prompt` tokens.

    Row i of the draft reads the target's states at token i and the embedding of token i + 1, and drafts token i + 2.
    """
    device = model.device
    _, states = CachedTarget(model, layers)(Tree(text, list(range(-1, len(text) - 1))), 0, logits_to_keep=1)
    rows = len(text) - 2
    ids = torch.tensor(text, device=device)
    g = draft.fuse([state[:rows] for state in states])
    a, _ = draft.layer(draft.embed(ids[1 : rows + 1]), g, torch.arange(rows, device=device))
    drafted = draft.draft_to_target(draft.logits(a).argmax(-1))
    answer = slice(prompt - 1, None)
    right = drafted[answer] == ids[2:][answer]
    return int(right.sum()), right.numel()


def verdict(found: dict[Layers, float]) -> tuple[bool, str]:
    """Whether the draft fits, and a sentence that says so."""
    (layers, share), *others = found.items()
    best, best_share = max(others, key=lambda other: other[1], default=(layers, share))
    if best_share > share + SIGNIFICANT:
        return False, (
            f"the layers {list(best)} fit better ({best_share:.2f}) than {list(layers)} ({share:.2f}): try "
            f"aux_layers {list(best)}"
        )
    if share < POOR:
        return False, (
            f"only {share:.2f} of the first drafted tokens are the target's: the draft was trained for another target "
            "or another prompt format, or its weights are damaged"
        )
    return True, f"the draft fits: {share:.2f} of its first drafted tokens are the target's"


def _chat(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt)
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
