"""The options of a training run, each described once. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vllm_eagle3.training.options import option

KINDS = ("soft_ce", "kl", "tv", "lk")
OPTIMIZERS = ("adamw", "muon")
INITS = ("target", "random")


@dataclass(frozen=True)
class LossOptions:
    """How many steps are simulated, and how the loss scores them."""

    steps: int = option(7, "simulated steps", flag="ttt_steps")
    decay: float = option(0.8, "step j weighs decay^(j-1)", flag="step_decay")
    kind: str = option("soft_ce", "loss of a drafted token", flag="loss", choices=KINDS)
    chain_share: float = option(
        1.0,
        "share of the chains that are simulated beyond step 1; drawn for each batch, and the loss is rescaled",
    )
    feature_loss: float = option(
        0.0,
        "weight of EAGLE-2's second loss, smooth L1 between the normed a and the target's last state",
        metavar="WEIGHT",
    )
    copy_loss: float = option(
        0.0, "teach the query heads of one key head to copy from the context", metavar="WEIGHT"
    )
    recompute: bool = option(False, "gradient checkpointing of the simulated steps")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"ttt_steps: expected at least 1, found {self.steps}")
        if not 0 < self.chain_share <= 1:
            raise ValueError(f"chain_share: expected 0 < share <= 1, found {self.chain_share}")


@dataclass(frozen=True)
class TrainSettings:
    """How a draft is trained. Paper defaults: AdamW (0.9, 0.95), clip 0.5, lr 5e-5."""

    out: Path
    loss: LossOptions = field(default_factory=LossOptions)
    max_steps: int | None = option(None, "optimiser steps")
    tokens: int | None = option(None, "answer tokens to train on, where --max-steps is not given")
    epochs: float = option(2.0, "passes over the data, where neither of the two is given")
    optimizer: str = option("adamw", "muon: for the matrices of the layer and fc", choices=OPTIMIZERS)
    lr: float = option(5e-5, "learning rate; for small targets up to 20 times the default")
    muon_lr: float | None = option(None, "learning rate of Muon (default: --lr)")
    warmup_share: float = option(0.02, "share of the steps with a rising learning rate")
    decay_share: float = option(0.98, "share of the steps, at the end, with a linearly falling learning rate")
    weight_decay: float = option(0.0, "of the optimisers")
    ema: float = option(
        0.0,
        "export a running average of the weights, e.g. 0.998 (default: 0, the last ones)",
        metavar="DECAY",
    )
    blend: float = option(
        1.0,
        "share of this run's weights in the result; the rest is the share of the weights that it started from",
    )
    clip: float = option(0.5, "largest gradient norm")
    batch_tokens: int = option(4096, "of a batch, with padding; a longer document is a batch by itself")
    accumulate: int = option(1, "batches a step")
    seed: int = option(0, "for the order of the data and for new weights")
    fp32: bool = option(False, "no bf16 autocast")
    save_every: int = option(100, "steps")
    eval_every: int = option(100, "steps")
    chain: int = option(5, "drafted tokens per chain in validation and decoding")
    patience: int = option(
        0, "stop after this many validations in succession without a better tau (default: 0, never)"
    )
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "accumulate", "save_every", "eval_every", "chain", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("max_steps", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        if self.epochs <= 0:
            raise ValueError(f"epochs: expected more than 0, found {self.epochs}")
        if not 0 < self.blend <= 1:
            raise ValueError(f"blend: expected 0 < share <= 1, found {self.blend}")

    def rate_at(self, step: int, total: int) -> float:
        """Factor on the learning rates: linear warm-up, then constant, then linear decay to a twentieth.

        The decay takes the last decay_share of `total` steps.
        """
        warm = max(1, round(self.warmup_share * total))
        decay = max(1, round(self.decay_share * total))
        left = min(1.0, (total - step) / decay)
        return min((step + 1) / warm, 0.05 + 0.95 * left)


@dataclass(frozen=True)
class Answers:
    """Files of prompts, the directory of their answers, and further arguments of `training.generate`."""

    prompts: tuple[Path, ...]
    out: Path
    arguments: tuple[str, ...] = ()

    def shards(self) -> list[Path]:
        return sorted(self.out.glob("part-*.jsonl.gz"))


@dataclass(frozen=True)
class Mix:
    """How often an epoch uses documents of `sources` (empty: all) whose temperature is `temperature` (None: any)."""

    weight: float
    sources: tuple[str, ...] = ()
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"mix: expected a weight of at least 0, found {self.weight}")

    def takes(self, source: str, temperature: float) -> bool:
        return (not self.sources or source in self.sources) and self.temperature in (None, temperature)


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own settings.

    mix: the first entry that fits a document gives its weight. A document that fits no entry is not used. An empty
    mix uses each document once.
    """

    name: str
    settings: TrainSettings
    mix: tuple[Mix, ...] = ()


@dataclass(frozen=True)
class TrainJob:
    """What is trained, on which data, and where the results go. `settings` are for a run with one stage."""

    target: str = option(None, "directory or name of the target model")
    settings: TrainSettings = field(kw_only=True)
    stages: tuple[Stage, ...] = ()
    data: tuple[Path, ...] = option((), "token rows: .jsonl or .jsonl.gz", metavar="FILE")
    answers: tuple[Answers, ...] = ()
    aux_layers: tuple[int, ...] | None = option(None, "states after k layers (default: 2, n // 2, n - 3)")
    draft_vocab_size: int | None = option(
        None,
        "number of most frequent answer tokens (default: as few as cover 98 %% of the held-out greedy answers, at most "
        "32768; with --init-from, the vocabulary of that draft)",
    )
    init: str = option("target", "start of the layer", choices=INITS)
    init_from: Path | None = option(
        None, "start from an exported draft; a larger --draft-vocab-size keeps its rows", metavar="DIR"
    )
    fc_norm: bool = option(False, "norm each state before fc (EAGLE-3.1)")
    norm_output: bool = option(False, "feed the normed output to the next step (EAGLE-3.1)")
    norm_before_residual: bool = option(False, "the residual is the normed g")
    validation_share: float = option(0.025, "share of the prompts held out, by hash")
    validation_limit: int = option(128, "documents validated on")
    validation_groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of tasks, each with its sources: tau is the mean over the tasks. Empty: one group of all sources."""
    limit: int | None = option(None, "train on this many documents only")
    prompt_loss: bool = option(False, "learn from the prompts too, useful if there are few answers")
    features_dir: Path | None = option(None, "keep the target's states on disk; the first epoch fills it")
    dtype: str = option("bfloat16", "of the target", choices=("bfloat16", "float16", "float32"))
    device: str | None = option(None, "default: cuda where there is one", choices=("cpu", "cuda"))
    decode_prompts: int = option(8, "held-out prompts decoded at the end, for the model card")
    speculators: bool = option(False, "export in the speculators form too")
    licence: str = option("other", "of the draft, for the model card")
    source_licences: dict[str, str] = field(default_factory=dict)
    """The licence of each source, for the model card. Empty: the card states none."""
    recipe: dict[str, str] = field(default_factory=dict)
    """Name and SHA-256 of the recipe, for the model card. Empty: there is no recipe."""

    @property
    def name(self) -> str:
        """The target's name in the model card."""
        return Path(self.target).name

    @property
    def out(self) -> Path:
        return self.settings.out

    @property
    def draft_options(self) -> dict[str, bool]:
        """The switches of PlainDraftConfig that are on."""
        return {
            name: True for name in ("fc_norm", "norm_output", "norm_before_residual") if getattr(self, name)
        }

    def __post_init__(self) -> None:
        if not self.target:
            raise ValueError("no target: give its directory or name with --target")
        if not self.data and not self.answers:
            raise ValueError(
                "nothing to train on: give token rows with --data, or prompts to answer with --prompts"
            )
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share: expected 0 <= share < 1, found {self.validation_share}")
