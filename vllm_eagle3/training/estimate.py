"""Estimates the time, the disk space and the tau of a run before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from vllm_eagle3.training.store import FeatureStore
from vllm_eagle3.training.trainer import Trainer

# (answer tokens trained on, tokens per verification of a greedy chain of 5 on the five tasks) of three heads for
# SmolLM2-135M-Instruct (training.json in checkpoints/, and its history). The data mix of the last one also changed.
CURVE = ((5.75e6, 2.29), (8.74e6, 2.36), (9.25e6, 2.50))


def tau_after(tokens: float) -> float:
    """The published curve at `tokens` answer tokens: linear in their logarithm through the first two points."""
    (x0, y0), (x1, y1) = CURVE[:2]
    return max(1.0, y0 + (y1 - y0) * math.log(tokens / x0) / math.log(x1 / x0))


def seconds_a_batch(trainer: Trainer) -> float:
    """Seconds of one forward and backward pass on the largest of the first batches. The weights do not change."""
    group = max(trainer.plan[:8], key=lambda g: sum(trainer.answers[i] for i in g))
    times = []
    for _ in range(2):  # the first one compiles and allocates
        started = time.monotonic()
        loss, _ = trainer.batch_loss(group, 0)
        loss.backward()
        if trainer.target.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - started)
    trainer.model.zero_grad(set_to_none=True)
    return times[-1] / sum(trainer.answers[i] for i in group) * trainer.answer_tokens / len(trainer.plan)


def estimate(trainers: Sequence[Trainer], store: FeatureStore | None) -> list[str]:
    """Sentences about the time, the disk space and the tau of a run with these stages."""
    hours = sum(
        seconds_a_batch(t) * (t.max_steps - t.at.step) * t.settings.accumulate / 3600 for t in trainers
    )
    epochs = [t.max_steps * t.settings.accumulate * t.ranks.world / len(t.plan) for t in trainers]
    tokens = sum(t.answer_tokens * n for t, n in zip(trainers, epochs, strict=True))
    weights = sum(p.numel() * 4 for p in trainers[0].parameters)
    states = sum(4 * weights * (t.settings.keep + 1) for t in trainers)
    disk = f"{states / 1e9:.1f} GB of states"
    if store:
        disk += f" and {store.size / 1e9:.1f} GB of features"
    return [
        f"estimate: about {hours:.1f} hours on this machine for the whole run, validation and decoding left out",
        f"estimate: at most {disk}",
        f"estimate: {tokens:,.0f} answer tokens; drafts of SmolLM2-135M-Instruct trained from nothing on as many had "
        f"a tau of about {tau_after(tokens):.1f} (chain of 5, T = 0, five tasks); other targets and data differ",
    ]
