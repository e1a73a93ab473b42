"""The training loop: optimiser, schedule, validation, exact resume, data parallel ranks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training.data import Batch, Document, fingerprint, make_batch, plan_batches
from vllm_eagle3.training.features import Features, Target
from vllm_eagle3.training.metrics_log import Record, Validation
from vllm_eagle3.training.optimizer import WeightAverage, make_optimizers
from vllm_eagle3.training.state import load_newest, save_state
from vllm_eagle3.training.store import FeatureStore
from vllm_eagle3.training.ttt import LossOptions, acceptance, ttt_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """How a draft is trained. Paper defaults: AdamW (0.9, 0.95), clip 0.5, lr 5e-5."""

    out: Path
    max_steps: int | None = None
    epochs: float = 2.0
    """Counts where max_steps is None."""
    loss: LossOptions = field(default_factory=LossOptions)
    lr: float = 5e-5
    warmup_share: float = 0.02
    decay_share: float = 0.98
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    """One of optimizer.OPTIMIZERS."""
    ema: float = 0.0
    """Decay of the running average of the weights, which is then what is validated and exported; 0: none."""
    clip: float = 0.5
    batch_tokens: int = 4096
    accumulate: int = 1
    seed: int = 0
    autocast: bool = True
    save_every: int = 100
    eval_every: int = 100
    patience: int = 0
    """Stop after this many validations without a better tau; 0: never."""
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "accumulate", "save_every", "eval_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, found {self.max_steps}")
        if self.epochs <= 0:
            raise ValueError(f"epochs: expected more than 0, found {self.epochs}")

    def lr_at(self, step: int, total: int) -> float:
        """Linear warm-up, constant, then linear decay to a twentieth over the last decay_share of `total`
        steps."""
        warm = max(1, round(self.warmup_share * total))
        decay = max(1, round(self.decay_share * total))
        left = min(1.0, (total - step) / decay)
        return self.lr * min((step + 1) / warm, 0.05 + 0.95 * left)


@dataclass
class Position:
    """Where training stands: everything a resume needs besides weights, optimiser and RNG."""

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    place: int = 0
    best_tau: float = 0.0
    stale: int = 0


class Trainer:
    """Trains `model` on `documents`. State on disk: out/state/step-N.pt, written whole or not at all.

    `on_save` and `on_best` are called by rank 0 after a state was written and after validation found a
    better tau.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: DraftModel,
        target: Target,
        documents: Sequence[Document],
        validation: Sequence[Document],
        store: FeatureStore | None = None,
        on_save: Callable[[Trainer], None] | None = None,
        on_best: Callable[[Trainer], None] | None = None,
    ) -> None:
        if not documents:
            raise ValueError("no documents to train on: is everything held out for validation?")
        self.settings = settings
        self.model = model.to(target.device)
        self.model.embed_tokens.to(target.embeddings.dtype)
        self.target, self.store = target, store
        self.documents = documents
        self.on_save, self.on_best = on_save, on_best
        self.data_sha1 = fingerprint(documents)
        self.head = target.head[model.target_ids.to(target.head.device)]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(model, settings.optimizer, settings.lr, settings.weight_decay)
        self.average = WeightAverage(self.parameters, settings.ema)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.at = Position()
        self.lengths = [len(d.tokens) for d in documents]
        self.plan = self._plan(self.lengths, 0)
        per_epoch = len(self.plan) / (settings.accumulate * self.world)
        self.max_steps = settings.max_steps or max(1, round(settings.epochs * per_epoch))
        self.record = Record(settings.out) if self.rank == 0 else None
        self.last_validation: Validation | None = None
        groups = self._plan([len(d.tokens) for d in validation], 0) if validation else []
        self.validation = [self._validation_batch(make_batch([validation[i] for i in g])) for g in groups]

    def _plan(self, lengths: Sequence[int], epoch: int) -> list[list[int]]:
        return plan_batches(lengths, self.settings.batch_tokens, self.settings.seed, epoch)

    def _validation_batch(self, batch: Batch) -> tuple[Batch, Features, Tensor]:
        batch = batch.to(self.target.device)
        features = self.target.features(batch)
        best = torch.cat([(part @ self.target.head.T).argmax(-1) for part in features.last.split(512)])
        return batch, features, best

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.target.device.type, dtype=torch.bfloat16, enabled=self.settings.autocast)

    def train(self) -> None:
        """Train from where the state on disk ends to max_steps, or until `patience` validations brought
        nothing."""
        s = self.settings
        self.resume()
        bar = tqdm(
            total=self.max_steps, initial=self.at.step, unit="step", smoothing=0.05, disable=self.rank > 0
        )
        started, seen = time.monotonic(), self.at.tokens
        while self.at.step < self.max_steps and not (s.patience and self.at.stale >= s.patience):
            losses = self.train_step()
            rate = (self.at.tokens - seen) / (time.monotonic() - started)
            bar.set_postfix_str(f"loss {losses[0]:.3f} .. {losses[-1]:.3f}, {rate:.0f} answer tokens/s")
            bar.update()
            row = {"step": self.at.step, "epoch": self.at.epoch, "tokens": self.at.tokens}
            if self.record:
                self.record.train(
                    row | {"lr": s.lr_at(self.at.step - 1, self.max_steps), "tokens_per_s": rate}, losses
                )
            last = self.at.step == self.max_steps
            if self.validation and (last or self.at.step % s.eval_every == 0):
                self._validate(row)
            if last or self.at.step % s.save_every == 0:
                self.save()
        bar.close()

    def _next_group(self) -> list[int]:
        if self.at.place == len(self.plan):
            self.at.epoch, self.at.place = self.at.epoch + 1, 0
            self.plan = self._plan(self.lengths, self.at.epoch)
        self.at.place += 1
        return self.plan[self.at.place - 1]

    def train_step(self) -> list[float]:
        """One optimiser step over accumulate x ranks batches; returns the mean loss of each simulated
        step."""
        s = self.settings
        groups = [self._next_group() for _ in range(s.accumulate * self.world)]
        self.model.train()
        means = torch.zeros(s.loss.steps, device=self.target.device)
        for group in groups[self.rank :: self.world]:
            batch = make_batch([self.documents[i] for i in group]).to(self.target.device)
            features = self.store.features(batch, group) if self.store else self.target.features(batch)
            with self.autocast():
                loss, parts = ttt_loss(self.model, batch, features, self.head, s.loss)
            (loss / (s.accumulate * self.world)).backward()
            means += parts / (s.accumulate * self.world)
        if self.world > 1:
            for tensor in [p.grad for p in self.parameters if p.grad is not None] + [means]:
                dist.all_reduce(tensor)
        for group_ in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group_["lr"] = s.lr_at(self.at.step, self.max_steps)
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
        self.at.tokens += sum(int(self.documents[i].mask.sum()) for group in groups for i in group)
        return means.tolist()

    def _validate(self, row: dict[str, int]) -> None:
        with self.average.applied():
            result = self.last_validation = self.evaluate()
        better = result.tau > self.at.best_tau
        self.at.best_tau = max(result.tau, self.at.best_tau)
        self.at.stale = 0 if better else self.at.stale + 1
        if self.record:
            self.record.validation(row, result)
            if better and self.on_best:
                self.on_best(self)

    def evaluate(self) -> Validation:
        """Greedy acceptance of every simulated step on the validation documents, with the weights as they are."""
        steps = self.settings.loss.steps
        hits, chances, tries, streaks = torch.zeros(4, steps, dtype=torch.float64)
        self.model.eval()
        for batch, features, best in self.validation:
            with self.autocast():
                right, valid = acceptance(self.model, batch, features, best, steps)
            streak = (right & valid).long().cumprod(0).bool()
            hits += (right & valid).sum(1).cpu()
            chances += valid.sum(1).cpu()
            tries += torch.cat([valid[:1], streak[:-1] & valid[1:]]).sum(1).cpu()
            streaks += streak.sum(1).cpu()
        n_alpha = streaks / tries.clamp(min=1)
        return Validation(
            (hits / chances.clamp(min=1)).tolist(), n_alpha.tolist(), 1 + float(n_alpha.cumprod(0).sum())
        )

    def save(self) -> None:
        """Write the state (rank 0) and call `on_save`."""
        if self.rank == 0:
            save_state(self)
            if self.on_save:
                self.on_save(self)

    def resume(self) -> None:
        """Continue from the newest state on disk, if there is one. Raises ValueError when it is of other
        data."""
        if load_newest(self):
            self.plan = self._plan(self.lengths, self.at.epoch)
            if self.record:
                self.record.rewind(self.at.step)
            logger.info("resumed at step %d of %s", self.at.step, self.settings.out)
