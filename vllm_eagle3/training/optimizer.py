"""Optimisers of a run, and the running average of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vllm_eagle3.training.settings import OPTIMIZERS


def make_optimizers(
    model: nn.Module, kind: str, lr: float, muon_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """The optimisers of all trainable parameters. Each parameter group keeps its learning rate as "base_lr".

    "adamw": AdamW (0.9, 0.95) for all, as in the paper. "muon": Muon for the matrices of the layer and fc, with
    steps as large as AdamW's at the same learning rate (arXiv 2502.16982), and AdamW for the head and the norms.

    Raises ValueError for another kind.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected {' or '.join(OPTIMIZERS)}, found {kind!r}")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if kind == "muon" and p.ndim == 2 and "lm_head" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained.values() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base_lr"] = group["lr"]
    return optimizers


class WeightAverage:
    """Exponential moving average of `parameters`. With decay 0 it is the parameters themselves and costs nothing.

    Raises ValueError for a decay outside 0 <= decay < 1.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema: expected 0 <= decay < 1, found {decay}")
        self.parameters, self.decay = list(parameters), decay
        self.average = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the parameters after `step` steps to the average. In early steps the average covers fewer of them."""
        if self.decay:
            keep = min(self.decay, step / (step + 10))
            torch._foreach_lerp_(self.average, self.parameters, 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the parameters hold the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self.average, self.parameters, strict=False):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)
