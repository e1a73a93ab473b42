"""Writes the figures of a running training to train.csv, validation.csv and TensorBoard events."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Validation:
    """Greedy acceptance on held-out text.

    alpha [steps]: share of all places at which step j of a chain drafts the text's token. n_alpha [steps]: the same
    share among the chains that decoding would start and whose earlier steps were all right. groups: tokens per
    verification of each group of sources, with the token of the target; tau: the mean over the groups.
    """

    alpha: list[float]
    n_alpha: list[float]
    tau: float
    groups: dict[str, float]


class Record:
    """Appends rows to CSV files in `out`. After a resume, rows of later steps are removed."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.board = SummaryWriter(str(out / "tensorboard"))

    def rewind(self, step: int) -> None:
        """Remove the rows that were written after `step`."""
        for name in ("train.csv", "validation.csv"):
            path = self.out / name
            if path.is_file():
                with path.open() as lines:
                    rows = list(csv.DictReader(lines))
                kept = [r for r in rows if int(r["step"]) <= step]
                path.unlink()
                for row in kept:
                    self._append(name, row)

    def train(self, row: dict[str, Any], losses: list[float]) -> None:
        self._append("train.csv", row | {f"loss_{j}": x for j, x in enumerate(losses, 1)})
        self.board.add_scalar("lr", row["lr"], row["step"])
        for j, x in enumerate(losses, 1):
            self.board.add_scalar(f"loss/step_{j}", x, row["step"])

    def validation(self, row: dict[str, Any], result: Validation) -> None:
        cells = {f"alpha_{j}": x for j, x in enumerate(result.alpha, 1)}
        cells |= {f"n_alpha_{j}": x for j, x in enumerate(result.n_alpha, 1)}
        cells |= {f"tau_{name}": x for name, x in result.groups.items()}
        self._append("validation.csv", row | {"tau": result.tau} | cells)
        for name, x in ({"tau": result.tau} | cells).items():
            self.board.add_scalar(f"validation/{name}", x, row["step"])

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self.out / name
        fresh = not path.exists()
        with path.open("a", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
