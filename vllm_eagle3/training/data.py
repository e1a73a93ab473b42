"""Token rows with a loss mask: reading, validation split, draft vocabulary, packed batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_eagle3.prompts import read_rows


@dataclass(frozen=True)
class Document:
    """One conversation: tokens int32 [n], mask bool [n] (True on the target's own answers)."""

    id: str
    source: str
    temperature: float
    tokens: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Documents laid end to end: tokens [T] int64, mask [T] bool, lengths [B]."""

    tokens: Tensor
    mask: Tensor
    lengths: Tensor

    def documents(self) -> Tensor:
        """Number of each token's document, [T]."""
        return torch.repeat_interleave(
            torch.arange(len(self.lengths), device=self.lengths.device), self.lengths
        )

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.tokens.to(device), self.mask.to(device), self.lengths.to(device))


def parse_row(row: Any, where: str) -> Document:
    """The document of a row {"prompt_token_ids", "response_token_ids"} or {"token_ids", "loss_mask"}.

    Raises ValueError, which names the place, what was expected and what was found.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if "token_ids" in row and "loss_mask" in row:
        tokens, mask = row["token_ids"], row["loss_mask"]
    elif "prompt_token_ids" in row and "response_token_ids" in row:
        prompt, answer = row["prompt_token_ids"], row["response_token_ids"]
        tokens, mask = prompt + answer, [0] * len(prompt) + [1] * len(answer)
    else:
        raise ValueError(
            f"{where}: expected prompt_token_ids and response_token_ids, or token_ids and loss_mask; "
            f"found {', '.join(sorted(row)) or 'an empty object'}"
        )
    if len(tokens) != len(mask):
        raise ValueError(f"{where}: token_ids has {len(tokens)} entries but loss_mask has {len(mask)}")
    return Document(
        str(row.get("id", where)),
        str(row.get("source", "unknown")),
        float(row.get("temperature", 0.0)),
        np.asarray(tokens, dtype=np.int32),
        np.asarray(mask, dtype=bool),
    )


def load_documents(paths: Sequence[str | Path], vocab_size: int) -> list[Document]:
    """All rows of `paths` with at least two answer tokens in succession (a single one is never drafted).

    Raises ValueError if there is no such row, or if a token id is outside the target's vocabulary.
    """
    documents = []
    for path in map(Path, paths):
        for where, row in read_rows(path):
            doc = parse_row(row, where)
            if len(doc.tokens) and not 0 <= doc.tokens.min() <= doc.tokens.max() < vocab_size:
                raise ValueError(
                    f"{where}: token ids lie in {doc.tokens.min()}..{doc.tokens.max()}, "
                    f"but the target's vocabulary has {vocab_size} entries: was this file made for "
                    "another model?"
                )
            if (doc.mask[1:] & doc.mask[:-1]).any():
                documents.append(doc)
    if not documents:
        raise ValueError(
            f"no row with two or more answer tokens in {', '.join(map(str, paths)) or 'an empty list'}"
        )
    return documents


FEWEST_HELD_OUT = 8  # prompts; if there are few prompts, a fifth of them


def split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(training, validation) by a hash of the prompt's id, so that added data does not move a prompt between the two.

    If `share` of the prompts is fewer than FEWEST_HELD_OUT, that many with the lowest hashes are held out.
    """

    def number(doc: Document) -> int:
        return int(hashlib.sha1(doc.id.split("#")[0].encode()).hexdigest()[:8], 16)

    prompts = sorted({number(d) for d in documents})
    least = min(FEWEST_HELD_OUT, len(prompts) // 5) if share else 0
    limit = max(int(share * 2**32), prompts[least] if least else 0)
    train = [d for d in documents if number(d) >= limit]
    return train, [d for d in documents if number(d) < limit]


def token_counts(documents: Sequence[Document], vocab_size: int) -> np.ndarray:
    """How often each target id occurs among the answer tokens, int64 [vocab]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for doc in documents:
        np.add.at(counts, doc.tokens[doc.mask], 1)
    return counts


COVERAGE = 0.98
LARGEST_VOCABULARY = 32768


def vocabulary_by_coverage(counts: np.ndarray, held_out: Sequence[Document]) -> int:
    """The smallest size, a multiple of 256, whose most frequent tokens cover COVERAGE of greedy held-out answers.

    It is at most LARGEST_VOCABULARY and at most the target's vocabulary.

    counts [vocab]: how often each token occurs in the training answers, which ranks the tokens. Without greedy
    held-out answers the coverage is that of the training answers, which is too optimistic.
    """
    judged = token_counts([d for d in held_out if d.temperature == 0], len(counts))
    judged = judged if judged.any() else counts
    covered = np.cumsum(judged[np.argsort(-counts, kind="stable")]) / max(1, judged.sum())
    size = int(np.searchsorted(covered, COVERAGE)) + 1
    return min(-(-size // 256) * 256, LARGEST_VOCABULARY, len(counts))


def draft_vocabulary(counts: np.ndarray, size: int) -> Tensor:
    """Sorted target ids [size] of the `size` most frequent tokens. Of equally frequent tokens the lower id wins."""
    if not 0 < size <= len(counts):
        raise ValueError(f"draft vocabulary: expected a size in 1..{len(counts)}, found {size}")
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def make_batch(documents: Sequence[Document]) -> Batch:
    return Batch(
        torch.from_numpy(np.concatenate([d.tokens for d in documents]).astype(np.int64)),
        torch.from_numpy(np.concatenate([d.mask for d in documents])),
        torch.tensor([len(d.tokens) for d in documents]),
    )


def uses(weights: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Indices of the documents of an epoch. A weight of 2.3 means two uses, and a third with probability 0.3."""
    chances = np.asarray(weights, dtype=np.float64)
    times = np.floor(chances) + (rng.random(len(chances)) < chances % 1)
    return np.repeat(np.arange(len(chances)), times.astype(np.int64))


def plan_batches(
    lengths: Sequence[int], tokens: int, seed: int, epoch: int, weights: Sequence[float] | None = None
) -> list[list[int]]:
    """One epoch: document indices in groups, each of which has at most `tokens` tokens including padding.

    weights: how often an epoch uses each document, on average (None: once).
    Documents are shuffled, then sorted by length within windows of 32 batches, so that there is little padding.
    A document longer than `tokens` is a batch by itself; no document is cut.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths)) if weights is None else rng.permutation(uses(weights, rng))
    if not len(order):
        raise ValueError("the weights leave no document to train on")
    window = max(1, int(32 * tokens / max(1.0, float(np.mean(np.asarray(lengths)[order])))))
    groups: list[list[int]] = []
    for start in range(0, len(order), window):
        group: list[int] = []
        for index in sorted(order[start : start + window].tolist(), key=lambda i: (lengths[i], i)):
            if group and (len(group) + 1) * lengths[index] > tokens:
                groups.append(group)
                group = []
            group.append(index)
        groups.append(group)
    return [groups[i] for i in rng.permutation(len(groups))]


def fingerprint(documents: Sequence[Document]) -> str:
    """SHA-1 over the tokens of all documents, in order."""
    digest = hashlib.sha1()
    for doc in documents:
        digest.update(np.int64(len(doc.tokens)).tobytes() + doc.tokens.tobytes())
    return digest.hexdigest()
