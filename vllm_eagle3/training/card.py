"""The model card that is written beside every exported head, and the numbers behind it as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle3.provenance import provenance
from vllm_eagle3.training.data import Document

if TYPE_CHECKING:
    from vllm_eagle3.training.job import TrainJob
    from vllm_eagle3.training.trainer import Trainer


@dataclass(frozen=True)
class Corpus:
    """What a draft was trained on. sources: documents of each; coverage: share of answer tokens in its
    vocabulary."""

    documents: int
    answer_tokens: int
    prompt_tokens: int
    validation_documents: int
    sources: dict[str, int]
    temperatures: dict[str, int]
    files: tuple[Path, ...]
    coverage: float

    @staticmethod
    def of(
        train: Sequence[Document], validation: Sequence[Document], files: Sequence[Path], coverage: float
    ) -> Corpus:
        answers = sum(int(d.mask.sum()) for d in train)
        return Corpus(
            len(train),
            answers,
            sum(len(d.tokens) for d in train) - answers,
            len(validation),
            dict(Counter(d.source for d in train).most_common()),
            {f"{t:g}": n for t, n in sorted(Counter(d.temperature for d in train).items())},
            tuple(files),
            coverage,
        )

    def sentence(self) -> str:
        return (
            f"{self.documents:,} documents with {self.answer_tokens:,} answer tokens "
            f"({self.prompt_tokens:,} prompt tokens), {self.validation_documents:,} held out; "
            f"the draft vocabulary covers {self.coverage:.2%} of the answer tokens"
        )


def facts(job: TrainJob, trainer: Trainer, corpus: Corpus) -> dict[str, Any]:
    """Provenance and results, as they go into training.json."""
    settings = {k: v for k, v in asdict(trainer.settings).items() if k != "out"}
    settings |= {"target": job.name, "init": job.init, "init_from": job.init_from and job.init_from.name}
    settings |= {"limit": job.limit, "prompt_loss": job.prompt_loss, "max_steps": trainer.max_steps}
    settings |= {"options": job.options, "aux_layers": trainer.model.config.aux_layers}
    settings["draft_vocab_size"] = trainer.model.config.draft_vocab_size
    result = trainer.last_validation
    return {
        "provenance": provenance(corpus.files, settings),
        "data": {k: v for k, v in asdict(corpus).items() if k != "files"},
        "training": asdict(trainer.at),
        "validation": asdict(result) if result else None,
    }


def write_card(path: Path, job: TrainJob, trainer: Trainer, corpus: Corpus) -> None:
    """Write README.md and training.json into the checkpoint directory `path`."""
    found = facts(job, trainer, corpus)
    (path / "training.json").write_text(json.dumps(found, indent=2, default=str) + "\n")
    origin, s, at = found["provenance"], trainer.settings, trainer.at
    lines = [
        "---",
        "library_name: vllm-eagle3",
        f"license: {job.licence}",
        "tags: [eagle3, speculative-decoding]",
        "---",
        f"# EAGLE-3 draft for {job.name}",
        "",
        f"A one-layer draft that proposes tokens for {job.name} to verify. It changes the speed of the",
        "target, not its output. Flat SafeAILab/SpecForge form: the embeddings are the target's, and are not",
        "shipped.",
        "",
        "## Training",
        f"- Data: {corpus.sentence()}.",
        f"- Answers are the target's own, at temperatures (documents each): {pairs(corpus.temperatures)}.",
        f"- {at.step:,} optimiser steps over {at.tokens:,} {'tokens' if job.prompt_loss else 'answer tokens'} "
        f"(epoch {at.epoch + 1}), "
        f"each token in up to {s.loss.steps} simulated steps.",
        f"- Loss {s.loss.kind}, step weights {s.loss.decay:g}^i, copy supervision {s.loss.copy_loss:g}, "
        f"{s.optimizer}, lr {s.lr:g}, weight average {s.ema:g}, "
        f"clip {s.clip:g}, {s.batch_tokens * s.accumulate * trainer.world:,} tokens a step, seed {s.seed}.",
        f"- Aux layers (states after k layers) {trainer.model.config.aux_layers}; draft vocabulary "
        f"{trainer.model.config.draft_vocab_size:,}; options {pairs(job.options) or 'none'}.",
        *source_lines(corpus.sources, job.source_licences),
        "",
        "## Validation",
        *validation_lines(found["validation"], corpus.validation_documents),
        "",
        "## Made with",
        f"- commit {origin['commit']}, {origin['date']}",
        f"- {pairs(origin['versions'])}",
        f"- {origin['device'].get('cpu', '')} {' '.join(origin['device'].get('gpus', []))}".rstrip(),
        f"- data (SHA-256): {pairs(origin['data'])}",
        "",
        "All settings and figures: `training.json`.",
    ]
    (path / "README.md").write_text("\n".join(lines) + "\n")


def source_lines(sources: dict[str, int], licences: dict[str, str]) -> list[str]:
    if not licences:
        return [f"- Sources (documents each): {pairs(sources)}."]
    rows = [f"| `{name}` | {count:,} | {licences[name]} |" for name, count in sources.items()]
    return ["", "| source of the prompts | documents | licence |", "| --- | --- | --- |", *rows]


def validation_lines(result: dict[str, Any] | None, documents: int) -> list[str]:
    if result is None:
        return ["None was held out, or none has been made yet."]
    steps = range(1, len(result["alpha"]) + 1)
    return [
        "Greedy agreement with the target's best token over its full vocabulary, on",
        f"{documents} held-out documents with their own text forced (not a measurement of decoding: see",
        "`vllm-eagle3 eval`).",
        "",
        "| step | " + " | ".join(map(str, steps)) + " |",
        "| --- |" + " --- |" * len(steps),
        "| acceptance | " + " | ".join(f"{x:.3f}" for x in result["alpha"]) + " |",
        "| given all earlier right | " + " | ".join(f"{x:.3f}" for x in result["n_alpha"]) + " |",
        "",
        f"Tokens per verification expected of a chain of {len(steps)}: {result['tau']:.3f}.",
    ]


def pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())
