"""The model card beside each exported head, and its numbers as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_eagle3.provenance import provenance
from vllm_eagle3.training.data import Document, token_counts
from vllm_eagle3.training.decoding import Decoding

if TYPE_CHECKING:
    from vllm_eagle3.training.settings import TrainJob
    from vllm_eagle3.training.trainer import Trainer


@dataclass(frozen=True)
class Corpus:
    """What a draft was trained on.

    sources: number of documents of each source; coverage: share of the training answers' tokens that are in the
    draft's vocabulary; held_out_coverage: the same share of greedy held-out answers (None if there are none).
    """

    documents: int
    answer_tokens: int
    prompt_tokens: int
    validation_documents: int
    sources: dict[str, int]
    temperatures: dict[str, int]
    files: tuple[Path, ...]
    coverage: float
    held_out_coverage: float | None

    @staticmethod
    def of(
        train: Sequence[Document],
        validation: Sequence[Document],
        files: Sequence[Path],
        vocabulary: np.ndarray,
        vocab_size: int,
    ) -> Corpus:
        """vocabulary: the target ids of the draft's tokens."""
        answers = sum(int(d.mask.sum()) for d in train)
        greedy = token_counts([d for d in validation if d.temperature == 0], vocab_size)
        return Corpus(
            len(train),
            answers,
            sum(len(d.tokens) for d in train) - answers,
            len(validation),
            dict(Counter(d.source for d in train).most_common()),
            {f"{t:g}": n for t, n in sorted(Counter(d.temperature for d in train).items())},
            tuple(files),
            covered(token_counts(train, vocab_size), vocabulary),
            covered(greedy, vocabulary) if greedy.any() else None,
        )

    def sentence(self) -> str:
        return (
            f"{self.documents:,} documents with {self.answer_tokens:,} answer tokens "
            f"({self.prompt_tokens:,} prompt tokens), {self.validation_documents:,} held out; "
            f"the draft vocabulary covers {self.coverage:.2%} of the answer tokens" + self._held_out()
        )

    def _held_out(self) -> str:
        if self.held_out_coverage is None:
            return ""
        return f" and {self.held_out_coverage:.2%} of the held-out greedy ones"


def covered(counts: np.ndarray, vocabulary: np.ndarray) -> float:
    return float(counts[vocabulary].sum() / max(1, counts.sum()))


def facts(job: TrainJob, trainer: Trainer, corpus: Corpus, decoded: Sequence[Decoding]) -> dict[str, Any]:
    """Provenance and results, as they go into training.json."""
    config, result = trainer.model.config, trainer.last_validation
    settings: dict[str, Any] = {
        "target": job.name,
        "init": job.init,
        "init_from": job.init_from and job.init_from.name,
    }
    settings |= {"limit": job.limit, "prompt_loss": job.prompt_loss, "options": job.draft_options}
    settings |= {"aux_layers": config.aux_layers, "draft_vocab_size": config.draft_vocab_size}
    settings |= {"recipe": job.recipe, "ranks": trainer.ranks.world, "stages": stage_facts(job)}
    return {
        "provenance": provenance(corpus.files, settings),
        "data": {k: v for k, v in asdict(corpus).items() if k != "files"},
        "training": asdict(trainer.at) | {"max_steps": trainer.max_steps, "out": trainer.settings.out.name},
        "validation": asdict(result) if result else None,
        "decoding": [asdict(d) for d in decoded],
    }


def stage_facts(job: TrainJob) -> list[dict[str, Any]]:
    stages = job.stages or (None,)
    return [
        {"name": stage.name if stage else "", "mix": [asdict(m) for m in stage.mix] if stage else []}
        | {k: v for k, v in asdict(stage.settings if stage else job.settings).items() if k != "out"}
        for stage in stages
    ]


def write_card(
    path: Path, job: TrainJob, trainer: Trainer, corpus: Corpus, decoded: Sequence[Decoding] = ()
) -> None:
    """Write README.md and training.json into the checkpoint directory `path`."""
    found = facts(job, trainer, corpus, decoded)
    (path / "training.json").write_text(json.dumps(found, indent=2, default=str) + "\n")
    origin, at, config = found["provenance"], trainer.at, trainer.model.config
    kind = "tokens" if job.prompt_loss else "answer tokens"
    where = f" of its last stage, {trainer.settings.out.name}," if job.stages else ""
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
        f"- {at.step:,} optimiser steps{where} over {at.tokens:,} {kind} (epoch {at.epoch + 1}).",
        *(f"- Recipe {pairs(job.recipe)}." for _ in [0] if job.recipe),
        *(stage_line(stage, trainer.ranks.world) for stage in found["provenance"]["settings"]["stages"]),
        f"- Aux layers (states after k layers) {config.aux_layers}; draft vocabulary "
        f"{config.draft_vocab_size:,}; options {pairs(job.draft_options) or 'none'}"
        + (f"; started from the draft `{job.init_from.name}`." if job.init_from else "."),
        *source_lines(corpus.sources, job.source_licences),
        "",
        "## Validation",
        *validation_lines(found["validation"]),
        *decoding_lines(decoded),
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


def stage_line(stage: dict[str, Any], ranks: int) -> str:
    """The settings of one stage in a sentence."""
    loss = stage["loss"]
    length = stage["max_steps"] or stage["tokens"] or stage["epochs"]
    unit = next(name for name in ("max_steps", "tokens", "epochs") if stage[name])
    text = f"- {stage['name'] or 'Settings'}: {length:,} {unit.removeprefix('max_')}, {loss['steps']} simulated steps"
    if loss["chain_share"] < 1:
        text += f" ({loss['chain_share']:g} of the chains beyond the first)"
    text += (
        f", loss {loss['kind']}, step weights {loss['decay']:g}^i, copy supervision {loss['copy_loss']:g}, "
    )
    text += f"{stage['optimizer']}, lr {stage['lr']:g}"
    if stage["muon_lr"]:
        text += f" (Muon {stage['muon_lr']:g})"
    text += f", weight average {stage['ema']:g}, clip {stage['clip']:g}, "
    text += f"{stage['batch_tokens'] * stage['accumulate'] * ranks:,} tokens a step, seed {stage['seed']}"
    mixes = [
        f"{m['weight']:g} x {', '.join(m['sources']) or 'all'}"
        + (f" at T = {m['temperature']:g}" if m["temperature"] is not None else "")
        for m in stage["mix"]
    ]
    return text + (f"; uses an epoch: {'; '.join(mixes)}." if mixes else ".")


def source_lines(sources: dict[str, int], licences: dict[str, str]) -> list[str]:
    if not licences:
        return [f"- Sources (documents each): {pairs(sources)}."]
    rows = [f"| `{name}` | {count:,} | {licences[name]} |" for name, count in sources.items()]
    return ["", "| source of the prompts | documents | licence |", "| --- | --- | --- |", *rows]


def validation_lines(result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return ["Nothing was held out, or nothing has been validated yet."]
    steps = range(1, len(result["alpha"]) + 1)
    groups = pairs({name: f"{tau:.2f}" for name, tau in result["groups"].items()})
    return [
        f"Chains of {len(steps)} through held-out greedy answers, as decoding takes them (the text is given, and",
        "the target is not run again).",
        "",
        "| step | " + " | ".join(map(str, steps)) + " |",
        "| --- |" + " --- |" * len(steps),
        "| acceptance at all places | " + " | ".join(f"{x:.3f}" for x in result["alpha"]) + " |",
        "| given all earlier accepted | " + " | ".join(f"{x:.3f}" for x in result["n_alpha"]) + " |",
        "",
        f"Tokens per verification: {result['tau']:.3f} ({groups}).",
    ]


def decoding_lines(decoded: Sequence[Decoding]) -> list[str]:
    if not decoded:
        return []
    rows = [f"| {d.draft} | {d.temperature:g} | {d.tau:.2f} |" for d in decoded]
    return [
        "",
        f"Decoded by the reference decoder on {decoded[0].prompts} held-out prompts:",
        "",
        "| draft | temperature | tokens per verification |",
        "| --- | --- | --- |",
        *rows,
    ]


def pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())
