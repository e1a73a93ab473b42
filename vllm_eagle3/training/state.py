"""Training states on disk. Each is written in one atomic step, and is exact to the bit when it is read back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_eagle3.training.trainer import Trainer


def states(out: Path) -> list[Path]:
    """Saved states of a run, oldest first."""
    return sorted((out / "state").glob("step-*.pt"), key=lambda p: int(p.stem.split("-")[1]))


def save_state(trainer: Trainer) -> Path:
    """Write out/state/step-N.pt and drop all but the newest `keep`.

    Raises OSError, with the older states intact, when the disk does not take it.
    """
    out = trainer.settings.out
    path = out / "state" / f"step-{trainer.at.step}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {
        "model": {k: v for k, v in trainer.model.state_dict().items() if k != "embed_tokens.weight"},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "average": trainer.average.average,
        "position": asdict(trainer.at),
        "data_sha1": trainer.data_sha1,
        "rng": torch.get_rng_state(),
    }
    try:
        torch.save(state, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        last = states(out)
        raise OSError(
            f"{path}: could not be written ({error}); the last good state is {last[-1] if last else 'none'}"
        ) from error
    for old in states(out)[: -trainer.settings.keep]:
        old.unlink()
    return path


def load_newest(trainer: Trainer) -> bool:
    """Load the newest state on disk into `trainer`. Returns False if there is none.

    Raises ValueError for a state of another draft or other data.
    """
    found = states(trainer.settings.out)
    if not found:
        return False
    state = torch.load(found[-1], map_location=trainer.target.device)
    if state["data_sha1"] != trainer.data_sha1:
        raise ValueError(
            f"{found[-1]}: this state was trained on other data; start a new run from its head, "
            "or give the same data"
        )
    mine = {k: v.shape for k, v in trainer.model.state_dict().items() if k != "embed_tokens.weight"}
    if mine != {k: v.shape for k, v in state["model"].items()}:
        raise ValueError(
            f"{found[-1]}: this state is of a draft with other tensors; were the options changed?"
        )
    found_kinds = len(state["optimizers"]), bool(state["average"])
    expected = len(trainer.optimizers), bool(trainer.average.average)
    if found_kinds != expected:
        raise ValueError(
            f"{found[-1]}: this state has {found_kinds[0]} optimisers and {'a' if found_kinds[1] else 'no'} weight "
            f"average, this run {expected[0]} and {'one' if expected[1] else 'none'}; "
            "were --optimizer or --ema changed?"
        )
    trainer.model.load_state_dict(state["model"], strict=False)
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for average, saved in zip(trainer.average.average, state["average"], strict=True):
        average.copy_(saved)
    vars(trainer.at).update(state["position"])
    torch.set_rng_state(state["rng"].cpu())
    return True
