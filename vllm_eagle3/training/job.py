"""One training run, from files to a finished checkpoint, as `vllm-eagle3 train` starts it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training import data as rows
from vllm_eagle3.training.answers import answer_prompts
from vllm_eagle3.training.card import Corpus, write_card
from vllm_eagle3.training.curves import draw_curves
from vllm_eagle3.training.data import Document, make_batch, token_counts
from vllm_eagle3.training.decoding import Decoding, decode_held_out
from vllm_eagle3.training.estimate import estimate
from vllm_eagle3.training.export import export
from vllm_eagle3.training.features import Target, check_target
from vllm_eagle3.training.initialize import new_draft, warm_start
from vllm_eagle3.training.ranks import Ranks
from vllm_eagle3.training.settings import Stage, TrainJob
from vllm_eagle3.training.store import FeatureStore
from vllm_eagle3.training.trainer import TrainData, Trainer
from vllm_eagle3.training.validation import ValidationSet, choose

logger = logging.getLogger(__name__)
SAMPLE_DOCUMENTS = 40  # to measure the scales of the target's states


@dataclass(frozen=True)
class Prepared:
    """What all stages of a run share: the target, the documents and their stored features."""

    ranks: Ranks
    target: Target
    train: list[Document]
    held_out: list[Document]
    files: list[Path]
    validation: ValidationSet | None
    store: FeatureStore | None


def prepare(job: TrainJob) -> Prepared:
    """Check the target, let it answer the prompts, then read and split the data. Raises as `train_draft`."""
    ranks = Ranks.join(job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_target(job.target, job.aux_layers)
    for answers in job.answers:
        ranks.together(functools.partial(answer_prompts, answers, job.target, job.dtype, ranks))
    files = [*job.data, *(shard for answers in job.answers for shard in answers.shards())]
    target = Target(job.target, job.aux_layers, getattr(torch, job.dtype), ranks.device)
    train, held_out = rows.split(rows.load_documents(files, len(target.embeddings)), job.validation_share)
    train = train[: job.limit]
    missing = sorted({d.source for d in train} - job.source_licences.keys()) if job.source_licences else []
    if missing:
        raise ValueError(f"source_licences: no licence is given for {', '.join(missing)}")
    groups = choose(held_out, job.validation_groups, job.validation_limit)
    batch_tokens = min(stage.settings.batch_tokens for stage in stages_of(job))
    validation = ValidationSet(target, groups, batch_tokens) if groups else None
    if job.prompt_loss:
        train = [replace(d, mask=np.ones_like(d.mask)) for d in train]
    store = open_store(job, target, train, ranks) if job.features_dir else None
    return Prepared(ranks, target, train, held_out, files, validation, store)


def open_store(job: TrainJob, target: Target, train: list[Document], ranks: Ranks) -> FeatureStore:
    """The feature store. The first rank of each host makes it before the others open it."""
    assert job.features_dir is not None
    path = job.features_dir

    def open_it() -> FeatureStore:
        return FeatureStore(path, target, train)

    first = ranks.together(open_it if ranks.local == 0 else None)
    return first or open_it()


def stages_of(job: TrainJob) -> tuple[Stage, ...]:
    return job.stages or (Stage("", job.settings),)


def first_model(job: TrainJob, ready: Prepared) -> DraftModel:
    """A new draft, or the one to start from, with the vocabulary that the job asks for."""
    target = ready.target
    counts = token_counts(ready.train, len(target.embeddings))
    size = job.draft_vocab_size
    if job.init_from:
        return warm_start(job.init_from, target, counts, size)
    if size is None:
        size = rows.vocabulary_by_coverage(counts, ready.held_out)
    sample = make_batch(ready.train[:SAMPLE_DOCUMENTS]).to(ready.ranks.device)
    vocabulary = rows.draft_vocabulary(counts, size)
    return new_draft(target, vocabulary, job.draft_options, job.init, job.settings.seed, sample)


def describe(job: TrainJob, ready: Prepared, model: DraftModel) -> Corpus:
    return Corpus.of(
        ready.train, ready.held_out, ready.files, model.target_ids.cpu().numpy(), model.config.vocab_size
    )


def weights_of(stage: Stage, documents: Sequence[Document]) -> list[float] | None:
    """How often an epoch of `stage` uses each document. None: each document once."""
    if not stage.mix:
        return None
    return [next((m.weight for m in stage.mix if m.takes(d.source, d.temperature)), 0.0) for d in documents]


def stage_trainer(job: TrainJob, ready: Prepared, stage: Stage, model: DraftModel) -> Trainer:
    data = TrainData(ready.train, ready.validation, ready.store, weights_of(stage, ready.train))
    return Trainer(stage.settings, model, ready.target, data, ready.ranks)


def build(job: TrainJob) -> tuple[Trainer, Corpus]:
    """The trainer of a job with one stage, and the corpus that it trains on."""
    ready = prepare(job)
    model = first_model(job, ready)
    corpus = describe(job, ready, model)
    return stage_trainer(job, ready, stages_of(job)[0], model), corpus


def publish(
    job: TrainJob, trainer: Trainer, corpus: Corpus, name: str, decoded: Sequence[Decoding] = ()
) -> None:
    """Export the draft in its present state to out/<name>, with its model card."""
    path = export(trainer.model, job.out / name)
    write_card(path, job, trainer, corpus, decoded)


def train_draft(job: TrainJob) -> Path:
    """Run `job` to its end and return the directory of the last head. A run that was stopped is resumed.

    Raises FileNotFoundError, ValueError, OSError, RuntimeError or FloatingPointError; the last good checkpoint is
    intact in each case.
    """
    ready = prepare(job)
    model = first_model(job, ready)
    corpus = describe(job, ready, model)
    trainers = [stage_trainer(job, ready, stage, model) for stage in stages_of(job)]
    if ready.ranks.rank == 0:
        logger.info("%s", corpus.sentence())
        for line in estimate(trainers, ready.store):
            logger.info("%s", line)

    def publish_as(name: str) -> Callable[[Trainer], None]:
        def publish_average(trainer: Trainer) -> None:
            with trainer.average.applied():
                publish(job, trainer, corpus, name)

        return publish_average

    for trainer in trainers:
        before = [p.detach().clone() for p in trainer.parameters] if trainer.settings.blend < 1 else None
        trainer.start_average()
        trainer.on_save, trainer.on_best = publish_as("head"), publish_as("best")
        trainer.train()
        trainer.finish(before)
    if ready.validation:
        trainers[-1].last_validation = trainers[-1].evaluate()
    ready.ranks.together(
        (lambda: publish_result(job, trainers, ready, corpus)) if ready.ranks.rank == 0 else None
    )
    return job.out / "head"


def publish_result(job: TrainJob, trainers: list[Trainer], ready: Prepared, corpus: Corpus) -> None:
    """Export the last head with its card, the tau of its decoding and the curves of all stages."""
    last = trainers[-1]
    decoded = decode_held_out(
        last.model, ready.target, ready.held_out, job.decode_prompts, last.settings.chain
    )
    publish(job, last, corpus, "head", decoded)
    if job.speculators:
        architectures = tuple(ready.target.config.architectures or ("LlamaForCausalLM",))
        form = job.out / "head-speculators"
        export(last.model, form, "speculators", verifier=job.target, verifier_architectures=architectures)
    draw_curves(job.out, [trainer.settings.out for trainer in trainers])
