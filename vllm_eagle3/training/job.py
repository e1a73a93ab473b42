"""One training run from files to a finished checkpoint: what `vllm-eagle3 train` does."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vllm_eagle3.reference.draft import load_draft
from vllm_eagle3.training.card import Corpus, write_card
from vllm_eagle3.training.curves import draw_curves
from vllm_eagle3.training.data import draft_vocabulary, load_documents, make_batch, split, token_counts
from vllm_eagle3.training.export import export
from vllm_eagle3.training.features import Target
from vllm_eagle3.training.initialize import new_draft
from vllm_eagle3.training.store import FeatureStore
from vllm_eagle3.training.trainer import Trainer, TrainSettings

logger = logging.getLogger(__name__)
SAMPLE_DOCUMENTS = 40  # from which the scales of the target's states are measured


@dataclass(frozen=True)
class TrainJob:
    """What to train, on what and where to. `options` are the switches of DraftConfig, e.g. {"fc_norm":
    True}."""

    target: str
    settings: TrainSettings
    data: tuple[Path, ...] = ()
    prompts: tuple[Path, ...] = ()
    generate_args: tuple[str, ...] = ()
    aux_layers: tuple[int, ...] | None = None
    draft_vocab_size: int = 8192
    init: str = "target"
    init_from: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    validation_share: float = 0.025
    validation_limit: int = 128
    limit: int | None = None
    prompt_loss: bool = False
    """Learn from the target's distributions over prompts too, not over its own answers alone."""
    features_dir: Path | None = None
    dtype: str = "bfloat16"
    device: str = "cpu"
    licence: str = "other"
    source_licences: dict[str, str] = field(default_factory=dict)
    """Of each source in the data, for the model card; empty: none are stated."""

    @property
    def name(self) -> str:
        """What the model card calls the target."""
        return Path(self.target).name

    def __post_init__(self) -> None:
        if not self.data and not self.prompts:
            raise ValueError(
                "nothing to train on: give token rows with --data, or prompts to answer with --prompts"
            )
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share: expected 0 <= share < 1, found {self.validation_share}")


def answer_prompts(job: TrainJob) -> list[Path]:
    """Let the target answer the prompts, in a process of its own (so that the engine's memory is given
    back)."""
    out = job.settings.out / "answers"
    command = [
        sys.executable,
        "-m",
        "vllm_eagle3.training.generate",
        "--target",
        job.target,
        "--out",
        str(out),
    ]
    command += ["--dtype", job.dtype, "--data", *map(str, job.prompts), *job.generate_args]
    logger.info("answering prompts: %s", " ".join(command))
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise RuntimeError(
            f"answering the prompts failed with exit code {done.returncode}: {' '.join(command)}"
        )
    return sorted(out.glob("part-*.jsonl.gz"))


def start_ranks(device: str) -> str:
    """Join the process group that torchrun announces; returns this rank's device."""
    if "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def build(job: TrainJob) -> tuple[Trainer, Corpus]:
    """Read, split and count the data, make the draft, and put both into a Trainer."""
    device = start_ranks(job.device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    files = list(job.data)
    if job.prompts:
        if rank == 0:
            files += answer_prompts(job)
        if dist.is_initialized():
            dist.barrier()
        files = [*job.data, *sorted((job.settings.out / "answers").glob("part-*.jsonl.gz"))]
    target = Target(job.target, job.aux_layers, getattr(torch, job.dtype), device)
    vocab_size = len(target.embeddings)
    train, validation = split(load_documents(files, vocab_size), job.validation_share)
    train, validation = train[: job.limit], validation[: job.validation_limit]
    if job.init_from:
        model = load_draft(job.init_from, embeddings=target.embeddings.float().cpu())
        if model.config.aux_layers != target.aux_layers or model.config.vocab_size != vocab_size:
            raise ValueError(
                f"{job.init_from}: made for layers {model.config.aux_layers} and {model.config.vocab_size} "
                f"tokens; this run has layers {target.aux_layers} and {vocab_size} tokens"
            )
    else:
        vocabulary = draft_vocabulary(token_counts(train, vocab_size), job.draft_vocab_size)
        sample = make_batch(train[:SAMPLE_DOCUMENTS]).to(device)
        model = new_draft(target, vocabulary, job.options, job.init, job.settings.seed, sample)
    counts = token_counts(train, vocab_size)
    kept = int(counts[model.target_ids.cpu().numpy()].sum())
    corpus = Corpus.of(train, validation, files, kept / max(1, int(counts.sum())))
    missing = sorted(corpus.sources.keys() - job.source_licences.keys()) if job.source_licences else []
    if missing:
        raise ValueError(f"source_licences: no licence is given for {', '.join(missing)}")
    logger.info("%s", corpus.sentence())
    if job.prompt_loss:
        train = [replace(d, mask=np.ones_like(d.mask)) for d in train]
    store = FeatureStore(job.features_dir, target, train) if job.features_dir else None
    trainer = Trainer(job.settings, model, target, train, validation, store)

    def publish_as(name: str) -> Callable[[Trainer], None]:
        return lambda trainer: publish(job, trainer, corpus, name)

    trainer.on_save, trainer.on_best = publish_as("head"), publish_as("best")
    return trainer, corpus


def publish(job: TrainJob, trainer: Trainer, corpus: Corpus, name: str) -> None:
    """Export the draft as it is to out/<name>, with its model card."""
    with trainer.average.applied():
        path = export(trainer.model, job.settings.out / name)
    write_card(path, job, trainer, corpus)


def train_draft(job: TrainJob, speculators: bool = False) -> Path:
    """Run `job` to its end; returns the directory of the last head.

    Raises FileNotFoundError, ValueError, OSError or FloatingPointError; the last good checkpoint is then
    intact.
    """
    trainer, corpus = build(job)
    trainer.train()
    head = job.settings.out / "head"
    if trainer.rank == 0:
        publish(job, trainer, corpus, "head")
        if speculators:
            architectures = tuple(trainer.target.config.architectures or ("LlamaForCausalLM",))
            form = job.settings.out / "head-speculators"
            with trainer.average.applied():
                export(
                    trainer.model,
                    form,
                    "speculators",
                    verifier=job.target,
                    verifier_architectures=architectures,
                )
        draw_curves(job.settings.out)
    return head
