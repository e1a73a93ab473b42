"""Statistics of a sweep, its Markdown table and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_eagle3.evaluation.sweep.settings import MODES, PAPER
from vllm_eagle3.evaluation.sweep.worker import Measurement

Runs = dict[tuple[str, int], list[Measurement]]  # (engine, batch size) -> one measurement per repeat
Row = dict[str, Any]


def bootstrap_median(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """95 % interval of the median by resampling with replacement (percentile method, fixed seed)."""
    picks = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(np.median(np.asarray(values)[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


def result_rows(runs: Runs) -> list[Row]:
    """A row per mode and batch size. `native` is the fastest `native-K` at that batch size.

    tokens_per_s: median over repeats; spread: the lowest and the highest. ratio_to_none: median of the ratios between
    measurements of the same repeat; ratio_interval: its bootstrapped 95 % interval. paper_ratio: from table 3 of the
    paper. tau: tokens per request and step of the target, including steps without a draft. drafted: share of the
    target's steps that verified a draft.
    """
    names = list(dict.fromkeys(name for name, _ in runs))
    sizes = list(dict.fromkeys(size for _, size in runs))
    rows = [_row(name, name, size, runs) for name in names for size in sizes]
    for size in sizes:
        native = [r for r in rows if r["batch_size"] == size and r["mode"].startswith("native-")]
        if native:
            best = max(native, key=lambda row: row["tokens_per_s"])
            rows.append(best | {"mode": "native", "engine": best["mode"]})
    return rows


def _row(mode: str, engine: str, size: int, runs: Runs) -> Row:
    found = runs[engine, size]
    speeds = [m.tokens / m.seconds for m in found]
    base = [m.tokens / m.seconds for m in runs.get(("none", size), [])]
    ratios = [speed / plain for speed, plain in zip(speeds, base, strict=False)]
    ratio = float(np.median(ratios)) if ratios else None
    paper = PAPER.get(size)
    tokens, accepted = sum(m.tokens for m in found), sum(m.accepted for m in found)
    return {
        "mode": mode,
        "engine": engine,
        "batch_size": size,
        "tokens_per_s": float(np.median(speeds)),
        "spread": [min(speeds), max(speeds)],
        "ratio_to_none": ratio,
        "ratio_interval": bootstrap_median(ratios) if ratios else None,
        "paper_ratio": paper,
        "ratio_to_paper": ratio / paper if ratio is not None and paper else None,
        "tau": tokens / max(tokens - accepted, 1),
        "drafted": sum(m.drafts for m in found) / max(tokens - accepted, 1),
        "runs": speeds,
    }


def shown(results: Sequence[Row]) -> list[Row]:
    """The rows of the modes. The rows of each `native-K` are only in the JSON."""
    return [row for row in results if not row["mode"].startswith("native-")]


def table(results: Sequence[Row], synthetic: bool) -> str:
    """Markdown: tokens/s, ratio to no speculation with its interval, the paper's ratio, the ratio of the two, tau."""

    def cell(row: Row) -> list[str]:
        low, high = row["spread"]
        ratio = row["ratio_to_none"]
        interval = row["ratio_interval"]
        mode = row["mode"] if row["mode"] == row["engine"] else f"{row['mode']} ({row['engine']})"
        return [
            str(row["batch_size"]),
            mode,
            f"{row['tokens_per_s']:.1f} ({low:.1f} to {high:.1f})",
            "-" if ratio is None else f"{ratio:.2f} ({interval[0]:.2f} to {interval[1]:.2f})",
            "-" if row["paper_ratio"] is None else f"{row['paper_ratio']:.2f}",
            "-" if row["ratio_to_paper"] is None else f"{row['ratio_to_paper']:.2f}",
            f"{row['tau']:.2f}",
        ]

    head = ["batch", "mode", "tokens/s (spread)", "ratio to none (95 %)", "paper", "ratio / paper", "tau"]
    order = sorted(shown(results), key=lambda row: (row["batch_size"], list(MODES).index(row["mode"])))
    lines = [head, ["---"] * len(head), *(cell(row) for row in order)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    warning = (
        "**SYNTHETIC ACCEPTANCE, RANDOM WEIGHTS: throughput of this shape, not of a trained draft.**\n\n"
    )
    return (warning if synthetic else "") + text


def plot(results: Sequence[Row], path: Path, synthetic: bool) -> None:
    """Draw the ratio to no speculation by batch size: one line with its interval per mode, and the paper's row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in shown(results) if row["ratio_to_none"] is not None and row["mode"] != "none"]
    sizes = sorted({row["batch_size"] for row in results})
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of_mode = sorted((row for row in rows if row["mode"] == mode), key=lambda row: row["batch_size"])
        places = [sizes.index(row["batch_size"]) for row in of_mode]
        ratios = np.array([row["ratio_to_none"] for row in of_mode])
        low, high = np.array([row["ratio_interval"] for row in of_mode]).T
        axis.errorbar(places, ratios, [ratios - low, high - ratios], marker="o", capsize=3, label=mode)
    paper = [(i, PAPER[size]) for i, size in enumerate(sizes) if size in PAPER]
    if paper:
        axis.plot(*zip(*paper, strict=True), "k--", marker="x", label="paper, table 3 (other model and GPU)")
    axis.axhline(1.0, color="black", linewidth=0.5)
    axis.set(
        xlabel="requests at a time", ylabel="tokens/s, ratio to no speculation", xticks=range(len(sizes))
    )
    axis.set_xticklabels([str(size) for size in sizes])
    if synthetic:
        axis.set_title("synthetic acceptance, random weights", color="red")
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
