"""Measures a finished draft: tokens per verification of the reference decoder on held-out prompts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_eagle3.reference.decode import Proposer, chain, decode, eagle2_tree
from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training.data import Document
from vllm_eagle3.training.features import Target

logger = logging.getLogger(__name__)
TREE = (6, 10, 60)  # depth, top-k, nodes: the engine's defaults
MAX_TOKENS = 64


@dataclass(frozen=True)
class Decoding:
    """tau of one kind of draft on `prompts` held-out prompts with `tokens` answer tokens in all."""

    draft: str
    temperature: float
    tau: float
    prompts: int
    tokens: int


def decode_held_out(
    model: DraftModel, target: Target, documents: Sequence[Document], prompts: int, chain_length: int
) -> list[Decoding]:
    """Chains and trees at temperatures 0 and 1 on the prompts of the first `prompts` documents. None for 0 prompts."""
    draft = copy.deepcopy(model).to(target.embeddings.dtype).eval()
    texts = list(
        {d.id: d.tokens[: int(d.mask.argmax())].tolist() for d in documents if d.mask.argmax()}.values()
    )
    texts = texts[:prompts]
    ways: dict[str, Proposer] = {
        f"chain, {chain_length} drafts": chain(chain_length),
        "tree, {} levels, top {}, {} nodes".format(*TREE): eagle2_tree(*TREE),
    }
    stop = target.model.generation_config.eos_token_id
    stop = {stop} if isinstance(stop, int) else set(stop or ())
    found = []
    for name, propose in ways.items() if texts else ():
        for temperature in (0.0, 1.0):
            generator = torch.Generator(device=target.device).manual_seed(0)
            answers = [
                decode(target.model, draft, ids, propose, MAX_TOKENS, stop, temperature, generator)
                for ids in texts
            ]
            verifications = sum(len(answer.accepted) for answer in answers)
            tau = 1 + sum(sum(answer.accepted) for answer in answers) / max(1, verifications)
            tokens = sum(len(answer.tokens) for answer in answers)
            found.append(Decoding(name, temperature, tau, len(texts), tokens))
            logger.info("decoding, %s, T = %g: tau %.2f", name, temperature, tau)
    return found
