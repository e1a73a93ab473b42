"""Prints the results of an evaluation as a table, and draws them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    "mode", "task", "tau", "without graft", "nodes", "n-alpha", "tokens/s", "speed-up", "exact match",
    "repeated 4-grams",
)  # fmt: skip


def table(results: Sequence[Row]) -> str:
    """The results as aligned text, with "-" where a figure does not apply."""

    def cells(row: Row) -> tuple[str, ...]:
        numbers = (
            ("tau", ".3f"), ("tau_without_graft", ".3f"), ("nodes", ".1f"), ("tokens_per_s", ".1f"),
            ("speedup", ".2f"), ("exact_match", ".1%"), ("repeated_4grams", ".1%"),
        )  # fmt: skip
        shown = ["-" if row[k] is None else format(row[k], f) for k, f in numbers]
        n_alpha = " ".join(f"{alpha:.2f}" for alpha in row["n_alpha"]) or "-"
        return row["mode"], row["task"], *shown[:3], n_alpha, *shown[3:]

    lines = [COLUMNS, *(cells(row) for row in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def plot(results: Sequence[Row], path: Path) -> None:
    """Draw tau and speed-up by task and mode, and n-alpha (mean over tasks) by mode. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = [mode for mode in dict.fromkeys(row["mode"] for row in results) if mode != "none"]
    tasks = list(dict.fromkeys(row["task"] for row in results))
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for name, label, axis in (
        ("tau", "tau (tokens per verification)", axes[0]),
        ("speedup", "speed-up", axes[1]),
    ):
        for i, mode in enumerate(modes):
            found = {row["task"]: row[name] for row in results if row["mode"] == mode}
            places = [place + (i - (len(modes) - 1) / 2) * 0.8 / len(modes) for place in range(len(tasks))]
            heights = [found[task] or 0.0 for task in tasks]
            axis.bar(places, heights, 0.8 / len(modes), label=mode)
        axis.set(ylabel=label, xticks=range(len(tasks)))
        axis.set_xticklabels(tasks, rotation=30, ha="right")
        axis.axhline(1.0, color="black", linewidth=0.5)
    for mode in modes:
        mean = next(row for row in results if row["mode"] == mode and row["task"] == "mean")
        axes[2].plot(mean["n_alpha"], marker="o", label=mode)
    axes[2].set(xlabel="n", ylabel="n-alpha, mean over tasks", ylim=(0, 1))
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    axes[2].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
