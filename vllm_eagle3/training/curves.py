"""Draws the curves of a run into one PNG."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def read(path: Path) -> dict[str, list[float]]:
    """Columns of a CSV file of numbers; empty when there is no such file."""
    if not path.is_file():
        return {}
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    return {name: [float(r[name]) for r in rows] for name in (rows[0] if rows else {})}


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average with bias correction."""
    out, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
        out.append(mean / total)
    return out


def read_stages(folders: Sequence[Path], name: str) -> dict[str, list[float]]:
    """The columns of the stages' CSV files, joined. Tokens are counted from the beginning of the first stage.

    Where a stage lacks a column, its values are NaN.
    """
    parts, first = [], 0.0
    for folder in folders:
        part, train = read(folder / name), read(folder / "train.csv")
        if part:
            parts.append(part | {"tokens": [first + x for x in part["tokens"]]})
        first += train["tokens"][-1] if train else 0.0
    columns = dict.fromkeys(column for part in parts for column in part)
    lengths = [len(part["tokens"]) for part in parts]
    return {
        c: [x for part, n in zip(parts, lengths, strict=True) for x in part.get(c, [float("nan")] * n)]
        for c in columns
    }


def draw_curves(out: Path, stages: Sequence[Path]) -> Path:
    """Draw loss, acceptance and tau against answer tokens from the CSV files of `stages`, into out/curves.png."""
    train, validation = read_stages(stages, "train.csv"), read_stages(stages, "validation.csv")
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    for name in (n for n in train if n.startswith("loss_")):
        axes[0].plot(train["tokens"], smooth(train[name]), label=f"step {name[5:]}")
    for name in (n for n in validation if n.startswith("n_alpha_")):
        axes[1].plot(validation["tokens"], validation[name], marker=".", label=f"step {name[8:]}")
    if validation:
        axes[2].plot(validation["tokens"], validation["tau"], marker=".")
    titles = (
        "training loss (smoothed)",
        "validation acceptance, earlier steps right",
        "tokens per verification",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="answer tokens")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    path = out / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
