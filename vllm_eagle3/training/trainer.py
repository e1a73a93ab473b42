"""The training loop: optimiser, schedule, validation, exact resume."""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_eagle3.training.data import Batch, Document, make_batch, plan_batches
from vllm_eagle3.training.export import export
from vllm_eagle3.training.features import Features, Target
from vllm_eagle3.training.model import DraftModel
from vllm_eagle3.training.record import Record, Validation
from vllm_eagle3.training.store import FeatureStore
from vllm_eagle3.training.ttt import acceptance, ttt_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """How a draft is trained. Paper defaults: 7 steps, 0.8^i, AdamW (0.9, 0.95), clip 0.5, lr 5e-5."""

    out: Path
    max_steps: int
    ttt_steps: int = 7
    step_decay: float = 0.8
    loss: str = "soft_ce"
    lr: float = 5e-5
    warmup_share: float = 0.02
    decay_share: float = 0.98
    weight_decay: float = 0.0
    clip: float = 0.5
    batch_tokens: int = 4096
    seed: int = 0
    autocast: bool = True
    save_every: int = 100
    eval_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("max_steps", "ttt_steps", "batch_tokens", "save_every", "eval_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, constant, then linear decay to a twentieth over the last decay_share of the steps."""
        warm = max(1, round(self.warmup_share * self.max_steps))
        decay = max(1, round(self.decay_share * self.max_steps))
        left = min(1.0, (self.max_steps - step) / decay)
        return self.lr * min((step + 1) / warm, 0.05 + 0.95 * left)


class Trainer:
    """Trains `model` on `documents`. State on disk: out/state/step-N.pt, written whole or not at all."""

    def __init__(
        self,
        settings: TrainSettings,
        model: DraftModel,
        target: Target,
        documents: list[Document],
        validation: list[Document],
        store: FeatureStore | None = None,
    ) -> None:
        self.settings = settings
        self.model = model.to(target.device)
        self.model.embed_tokens.to(target.embeddings.dtype)
        self.target = target
        self.documents = documents
        self.store = store
        self.head = target.head[model.target_ids.to(target.head.device)]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
        )
        self.step = self.tokens = self.epoch = self.place = 0
        self.record = Record(settings.out)
        self.validation = [self._validation_batch(b, validation) for b in self._plan(validation, 0)]

    def _plan(self, documents: list[Document], epoch: int) -> list[list[int]]:
        lengths = [len(d.tokens) for d in documents]
        return plan_batches(lengths, self.settings.batch_tokens, self.settings.seed, epoch) if documents else []

    def _validation_batch(self, group: list[int], documents: list[Document]) -> tuple[Batch, Features, Tensor]:
        batch = make_batch([documents[i] for i in group]).to(self.target.device)
        features = self.target.features(batch)
        best = torch.cat([(part @ self.target.head.T).argmax(-1) for part in features.last.split(512)])
        return batch, features, best

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.target.device.type, dtype=torch.bfloat16, enabled=self.settings.autocast)

    def train(self) -> None:
        """Train from where the state on disk ends to max_steps, saving, validating and exporting on the way."""
        s = self.settings
        self.resume()
        bar = tqdm(total=s.max_steps, initial=self.step, unit="step", smoothing=0.05)
        plan = self._plan(self.documents, self.epoch)
        started, seen = time.monotonic(), 0
        while self.step < s.max_steps:
            if self.place == len(plan):
                self.epoch, self.place = self.epoch + 1, 0
                plan = self._plan(self.documents, self.epoch)
            losses, answers = self.train_step(plan[self.place])
            seen += answers
            self.tokens += answers
            self.step += 1
            self.place += 1
            rate = seen / (time.monotonic() - started)
            bar.set_postfix_str(f"loss {losses[0]:.3f} .. {losses[-1]:.3f}, {rate:.0f} answer tokens/s")
            bar.update()
            row = {"step": self.step, "epoch": self.epoch, "tokens": self.tokens}
            self.record.train(row | {"lr": s.lr_at(self.step - 1), "tokens_per_s": rate}, losses)
            last = self.step == s.max_steps
            if self.validation and (last or self.step % s.eval_every == 0):
                self.record.validation(row, self.evaluate())
            if last or self.step % s.save_every == 0:
                self.save()
        bar.close()

    def train_step(self, group: list[int]) -> tuple[list[float], int]:
        """One optimiser step on the documents of `group`; returns per-step losses and the number of answer tokens."""
        s = self.settings
        batch = make_batch([self.documents[i] for i in group])
        answers = int(batch.mask.sum())
        batch = batch.to(self.target.device)
        features = self.store.features(batch, group) if self.store else self.target.features(batch)
        self.model.train()
        with self.autocast():
            loss, means = ttt_loss(self.model, batch, features, self.head, s.ttt_steps, s.step_decay, s.loss)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.step + 1}: no weights were changed and the state in "
                f"{s.out / 'state'} is intact; a lower --lr usually helps"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr_at(self.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return means.tolist(), answers

    def evaluate(self) -> Validation:
        """Greedy acceptance of every simulated step on the validation documents."""
        self.model.eval()
        hits, chances, tries, streaks = torch.zeros(4, self.settings.ttt_steps, dtype=torch.float64)
        for batch, features, best in self.validation:
            with self.autocast():
                right, valid = acceptance(self.model, batch, features, best, self.settings.ttt_steps)
            streak = (right & valid).long().cumprod(0).bool()
            hits += (right & valid).sum(1).cpu()
            chances += valid.sum(1).cpu()
            tries += torch.cat([valid[:1], streak[:-1] & valid[1:]]).sum(1).cpu()
            streaks += streak.sum(1).cpu()
        return Validation(
            (hits / chances.clamp(min=1)).tolist(),
            (streaks / tries.clamp(min=1)).tolist(),
            1 + float((streaks / tries.clamp(min=1)).cumprod(0).sum()),
        )

    def states(self) -> list[Path]:
        """Saved states, oldest first."""
        return sorted((self.settings.out / "state").glob("step-*.pt"), key=lambda p: int(p.stem.split("-")[1]))

    def save(self) -> None:
        """Write the state and the exported head; keep the last `keep` states."""
        folder = self.settings.out / "state"
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": {k: v for k, v in self.model.state_dict().items() if k != "embed_tokens.weight"},
            "optimizer": self.optimizer.state_dict(),
            "position": (self.step, self.tokens, self.epoch, self.place),
            "rng": torch.get_rng_state(),
        }
        partial = folder / "partial.pt"
        torch.save(state, partial)
        os.replace(partial, folder / f"step-{self.step}.pt")
        for old in self.states()[: -self.settings.keep]:
            old.unlink()
        export(self.model, self.settings.out / "head")

    def resume(self) -> None:
        """Continue from the newest state on disk, if there is one."""
        states = self.states()
        if not states:
            return
        state = torch.load(states[-1], map_location=self.target.device)
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.epoch, self.place = state["position"]
        torch.set_rng_state(state["rng"].cpu())
        self.record.rewind(self.step)
        logger.info("resumed from %s", states[-1])
