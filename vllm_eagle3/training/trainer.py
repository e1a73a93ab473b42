"""The training loop: optimiser, schedule, validation, exact resume, data parallel ranks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training.data import Document, fingerprint, make_batch, plan_batches
from vllm_eagle3.training.features import Target
from vllm_eagle3.training.metrics_log import Record, Validation
from vllm_eagle3.training.optimizer import WeightAverage, make_optimizers
from vllm_eagle3.training.ranks import Ranks
from vllm_eagle3.training.settings import TrainSettings
from vllm_eagle3.training.state import load_newest, save_state
from vllm_eagle3.training.store import FeatureStore
from vllm_eagle3.training.ttt import ttt_loss
from vllm_eagle3.training.validation import ValidationSet

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """The progress of training: everything that a resume needs besides weights, optimisers and random states."""

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    place: int = 0
    best_tau: float = 0.0
    stale: int = 0


@dataclass(frozen=True)
class TrainData:
    """The data of a trainer: documents, their features on disk if they are stored, and the validation set.

    weights: uses of each document per epoch (None: one each).
    """

    documents: Sequence[Document]
    validation: ValidationSet | None = None
    store: FeatureStore | None = None
    weights: Sequence[float] | None = None


class Trainer:
    """Trains `model` on `data`. Its states on disk are out/state/step-N.pt.

    Rank 0 calls `on_save` after each state that it writes, and `on_best` after each validation with a better tau.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: DraftModel,
        target: Target,
        data: TrainData,
        ranks: Ranks | None = None,
        on_save: Callable[[Trainer], None] | None = None,
        on_best: Callable[[Trainer], None] | None = None,
    ) -> None:
        if not data.documents:
            raise ValueError("no documents to train on: is everything held out for validation?")
        self.settings = settings
        self.model = model.to(target.device)
        self.model.embed_tokens.to(target.embeddings.dtype)
        self.target, self.data = target, data
        self.on_save, self.on_best = on_save, on_best
        self.data_sha1 = fingerprint(data.documents)
        self.head = target.head.of(model.target_ids)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(
            model, settings.optimizer, settings.lr, settings.muon_lr or settings.lr, settings.weight_decay
        )
        self.average = WeightAverage(self.parameters, settings.ema)
        self.ranks = ranks or Ranks()
        self.at = Position()
        self.lengths = [len(d.tokens) for d in data.documents]
        self.answers = [int(d.mask.sum()) for d in data.documents]
        self.plan = self._plan(0)
        self.max_steps = settings.max_steps or self._steps()
        self.record = Record(settings.out) if self.ranks.rank == 0 else None
        self.last_validation: Validation | None = None

    def _plan(self, epoch: int) -> list[list[int]]:
        s = self.settings
        return plan_batches(self.lengths, s.batch_tokens, s.seed, epoch, self.data.weights)

    def _steps(self) -> int:
        """Optimiser steps of `tokens` answer tokens, or of `epochs`."""
        s = self.settings
        per_epoch = len(self.plan) / (s.accumulate * self.ranks.world)
        epochs = s.epochs
        if s.tokens is not None:
            epochs = s.tokens / self.answer_tokens
        return max(1, round(epochs * per_epoch))

    @property
    def answer_tokens(self) -> int:
        """Number of answer tokens in this epoch's plan."""
        return sum(self.answers[i] for group in self.plan for i in group)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.target.device.type, dtype=torch.bfloat16, enabled=not self.settings.fp32)

    def train(self) -> None:
        """Train from the newest state on disk to max_steps, or until `patience` validations gave no better tau."""
        s = self.settings
        self.resume()
        bar = tqdm(
            total=self.max_steps,
            initial=self.at.step,
            unit="step",
            smoothing=0.05,
            disable=self.ranks.rank > 0,
        )
        started, seen = time.monotonic(), self.at.tokens
        while self.at.step < self.max_steps and not (s.patience and self.at.stale >= s.patience):
            losses = self.train_step()
            rate = (self.at.tokens - seen) / (time.monotonic() - started)
            tau = f", tau {self.last_validation.tau:.2f}" if self.last_validation else ""
            bar.set_postfix_str(f"loss {losses[0]:.3f} .. {losses[-1]:.3f}, {rate:.0f} answer tokens/s{tau}")
            bar.update()
            row = {"step": self.at.step, "epoch": self.at.epoch, "tokens": self.at.tokens}
            if self.record:
                lr = s.lr * s.rate_at(self.at.step - 1, self.max_steps)
                self.record.train(row | {"lr": lr, "tokens_per_s": rate}, losses)
            last = self.at.step == self.max_steps
            if self.data.validation and (last or self.at.step % s.eval_every == 0):
                self._validate(row)
            if last or self.at.step % s.save_every == 0:
                self.save()
        bar.close()

    def _next_group(self) -> list[int]:
        if self.at.place == len(self.plan):
            self.at.epoch, self.at.place = self.at.epoch + 1, 0
            self.plan = self._plan(self.at.epoch)
        self.at.place += 1
        return self.plan[self.at.place - 1]

    def batch_loss(self, group: Sequence[int], draw: int) -> tuple[Tensor, Tensor]:
        """`ttt_loss` of the documents `group`.

        `draw` is the number of the batch. It seeds the choice of chains, so that a resumed run, or another rank,
        chooses the same ones.
        """
        s, data = self.settings, self.data
        batch = make_batch([data.documents[i] for i in group]).to(self.target.device)
        features = data.store.features(batch, group) if data.store else self.target.features(batch)
        generator = torch.Generator().manual_seed((s.seed << 32) + draw)
        with self.autocast():
            return ttt_loss(self.model, batch, features, self.head, s.loss, generator)

    def train_step(self) -> list[float]:
        """One optimiser step over accumulate x ranks batches. Returns the mean loss of each simulated step."""
        s, world = self.settings, self.ranks.world
        batches = s.accumulate * world
        groups = [self._next_group() for _ in range(batches)]
        self.model.train()
        means = torch.zeros(s.loss.steps, device=self.target.device)
        for i in range(self.ranks.rank, batches, world):
            loss, parts = self.batch_loss(groups[i], self.at.step * batches + i)
            (loss / batches).backward()
            means += parts / batches
        if world > 1:
            for tensor in [p.grad for p in self.parameters if p.grad is not None] + [means]:
                dist.all_reduce(tensor)
        factor = s.rate_at(self.at.step, self.max_steps)
        for group_ in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group_["lr"] = group_["base_lr"] * factor
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, s.clip)
        if not (math.isfinite(float(norm)) and math.isfinite(float(means.sum()))):
            raise FloatingPointError(
                f"step {self.at.step + 1}: loss {means.tolist()}, gradient norm {float(norm)}; no weights "
                f"were changed and the states in {s.out / 'state'} are intact; a lower lr usually helps"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.at.step += 1
        self.average.update(self.at.step)
        self.at.tokens += sum(self.answers[i] for group in groups for i in group)
        return means.tolist()

    def evaluate(self) -> Validation:
        """Validate the present weights. Each rank validates its part. Needs validation documents."""
        assert self.data.validation is not None
        self.model.eval()
        with self.autocast():
            return self.data.validation.measure(self.model, self.settings.chain, self.ranks)

    def _validate(self, row: dict[str, int]) -> None:
        with self.average.applied():
            result = self.last_validation = self.evaluate()
        better = result.tau > self.at.best_tau
        self.at.best_tau = max(result.tau, self.at.best_tau)
        self.at.stale = 0 if better else self.at.stale + 1
        if self.record:
            self.record.validation(row, result)
        best = self.on_best if better and self.ranks.rank == 0 else None
        self.ranks.together(lambda: best(self) if best else None)

    def save(self) -> None:
        """On rank 0: write the state and call `on_save`. The other ranks wait, and end if that fails."""

        def write() -> None:
            save_state(self)
            if self.on_save:
                self.on_save(self)

        self.ranks.together(write if self.ranks.rank == 0 else None)

    def resume(self) -> None:
        """Continue from the newest state on disk, if there is one. Raises ValueError if it belongs to other data."""
        if load_newest(self):
            self.plan = self._plan(self.at.epoch)
            if self.record:
                self.record.rewind(self.at.step)
            logger.info("resumed at step %d of %s", self.at.step, self.settings.out)

    def start_average(self) -> None:
        """Begin the average at the present weights, which an earlier stage may have changed since `__init__`."""
        self.average = WeightAverage(self.parameters, self.settings.ema)

    def finish(self, before: Sequence[Tensor] | None = None) -> None:
        """Write the result of the run into the model.

        The result is the average of the weights, or the last weights if there is no average, blended with the
        parameters `before`, from which the run started.
        """
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average.average, strict=False):
                parameter.copy_(average)
            if self.settings.blend < 1 and before is not None:
                for parameter, old in zip(self.parameters, before, strict=True):
                    parameter.lerp_(old, 1 - self.settings.blend)
