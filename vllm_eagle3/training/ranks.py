"""The processes of a run that torchrun started: their numbers, and how a failure in one of them ends all."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# Answering prompts or computing features may take hours, so no rank stops waiting for the others after some time.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes: its number, its number on this host and its device.

    control: a gloo group without a time limit, for everything except gradients; None for a single process.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    device: str = "cpu"
    control: Any = None

    @staticmethod
    def join(device: str) -> Ranks:
        """Join the process group that torchrun announces in the environment, if it does."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if "RANK" not in os.environ or world == 1:
            return Ranks(device=device)
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "cuda":
            torch.cuda.set_device(local)
            device = f"cuda:{local}"
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
            # Otherwise a thread of the group may abort this process at its exit, when another rank has ended first.
            atexit.register(_leave)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        return Ranks(dist.get_rank(), world, local, device, control)

    def together(self, action: Callable[[], T] | None) -> T | None:
        """Run `action` (None if this rank has nothing to do) and wait until every rank is done.

        If it fails on one rank, that rank raises its own error, and all others raise RuntimeError with its message.
        """
        result, error = None, None
        try:
            result = action() if action else None
        except Exception as caught:
            if self.world == 1:
                raise
            error = caught
        if self.world > 1:
            messages: list[str | None] = [None] * self.world
            dist.all_gather_object(messages, str(error) if error else None, group=self.control)
            if error:
                raise error
            for rank, message in enumerate(messages):
                if message is not None:
                    raise RuntimeError(f"rank {rank} failed: {message}")
        return result

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks, on the CPU."""
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
        return values


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
