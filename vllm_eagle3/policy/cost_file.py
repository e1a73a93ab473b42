"""The cost file: what an engine learned about its step times, kept for the next start.

The file only saves learning time, so nothing about it may stop an engine: whatever is wrong with it is one warning,
and the costs are learned again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_eagle3.config import cache_folder
from vllm_eagle3.policy import cost_table
from vllm_eagle3.policy.cost import SeenCost, StepCostModel, interpolate

logger = logging.getLogger("vllm.eagle3")

FORMAT = (
    1  # of the JSON file; to be raised when StepCostModel.guess changes, because the file holds ratios to it
)
LARGEST = 1 << 20  # bytes; a file that we write has a few thousand
SAME_MACHINE = 1.25  # largest ratio of two measurements of one time on an unchanged machine


@dataclass(frozen=True)
class CostKey:
    """What the costs are valid for. Every field is part of the file's name, and is checked on load."""

    model: str
    draft: str
    device: str
    version: str  # vLLM's version and whatever else changes kernels (dtype, tensor-parallel size)

    def path(self, directory: str | Path | None = None) -> Path:
        """File of this key under `directory` (default `$XDG_CACHE_HOME/vllm-eagle3/cost`).

        Raises RuntimeError where there is neither XDG_CACHE_HOME nor a home directory.
        """
        base = cache_folder() / "cost" if directory is None else directory
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return Path(base) / f"{digest}.json"


class CostFile:
    """Loads the costs of `key` at a start, and saves them while the engine serves."""

    BUSY_SECONDS = 60.0  # between two saves of an engine that is always busy
    IDLE_SECONDS = 5.0  # between two saves of an engine that gets idle again and again

    def __init__(
        self,
        key: CostKey,
        directory: str | Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.key, self._clock = key, clock
        self._warned = False
        self._saved: tuple[float, int] | None = None  # when, and how many observations there were
        self._began = clock()
        self.path: Path | None = None
        try:
            self.path = key.path(directory)
        except RuntimeError as error:
            self._warn(f"the costs of steps cannot be kept for the next start: {error}; set XDG_CACHE_HOME")

    def load(self) -> SeenCost:
        """The costs seen in earlier runs; a guess where there is no file, and, with a warning, where it is damaged."""
        try:
            if self.path is not None:
                return self._read(self.path)
        except FileNotFoundError:
            pass
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._warn(f"the cost file {self.path} cannot be used and is learned anew: {reason}")
        return SeenCost(StepCostModel.guess())

    def _read(self, path: Path) -> SeenCost:
        size = path.stat().st_size
        if not path.is_file() or size > LARGEST:
            raise ValueError(
                f"expected a file of at most {LARGEST} bytes, found another thing of {size} bytes"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
        found = (data["format"], data["key"])
        if found != (FORMAT, asdict(self.key)):
            raise ValueError(
                f"expected format {FORMAT} for {asdict(self.key)}, found format {found[0]} for {found[1]}"
            )
        measured = data.get("model")
        cost = SeenCost(StepCostModel.guess() if measured is None else cost_table.from_json(measured))
        cost.from_json(data["seen"])
        return cost

    def keep_model(self, model: StepCostModel) -> None:
        """Write a model measured at start-up. What was seen with an earlier one stays, if both are of one machine.

        They are where none of the target's times has changed by more than SAME_MACHINE: another driver or another way
        of running steps changes them more, and then what was seen is outdated as well. Never raises.
        """
        known = self.load()
        if known.model == StepCostModel.guess() or not alike(known.model, model):
            self.save(SeenCost(model))

    def save_when_due(self, cost: SeenCost, idle: bool) -> None:
        """Save what changed: each minute, or sooner when the engine has just become idle. Never raises."""
        now = self._clock()
        last, observations = self._saved or (self._began, 0)
        due = self.IDLE_SECONDS if idle else self.BUSY_SECONDS
        first_rest = idle and self._saved is None
        if cost.observations != observations and (first_rest or not 0.0 <= now - last < due):
            self.save(cost)

    def save(self, cost: SeenCost) -> None:
        """Write the file in one atomic step. What goes wrong is logged, once, and never raised."""
        self._saved = (self._clock(), cost.observations)
        if self.path is None:
            return
        part = self.path.with_suffix(f".{os.getpid()}.part")
        data = {
            "format": FORMAT,
            "key": asdict(self.key),
            "seen": cost.to_json(),
        }
        if cost.model != StepCostModel.guess():
            data["model"] = cost_table.to_json(cost.model)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(data), encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            self._warn(f"the costs of steps cannot be kept for the next start in {self.path}: {error}")
            _remove(part)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("vllm-eagle3: %s", text)


def alike(old: StepCostModel, new: StepCostModel) -> bool:
    """Whether two measured models have about the same times of the target."""
    ratios = [
        seconds / max(interpolate(old.target[context], tokens), 1e-9)
        for context, curve in new.target.items()
        if context in old.target
        for tokens, seconds in curve.items()
    ]
    return bool(ratios) and all(1 / SAME_MACHINE <= ratio <= SAME_MACHINE for ratio in ratios)


def _remove(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError:
        logger.debug("vllm-eagle3: %s could not be removed", part)
