"""Computes tau, n-alpha, tokens/s and identity from the counts of the runs.

A verification is one step of the target that reads a draft. tau = 1 + accepted drafted tokens / verifications, which is
the number of tokens per verification including the target's own. n-alpha (for chains) is the share of n-th drafted
tokens (from 0) that were accepted, among those whose predecessors were all accepted. tokens/s counts the tokens after
the first one of each answer, divided by the time in which at least one answer was being decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from vllm_eagle3.evaluation.settings import GRAFT

Answers = dict[str, list[list[int]]]  # prompt id -> token ids of each turn's answer


@dataclass
class TaskRun:
    """The counts of one mode on one task. `decode_seconds` is None if the mode's speed is not reported."""

    mode: str
    task: str
    verifications: int = 0
    accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    decode_tokens: int = 0
    decode_seconds: float | None = None
    answers: Answers = field(default_factory=dict)
    drafted: int = 0

    def count(self, verifications: int, accepted: int, per_position: Sequence[int], drafted: int) -> None:
        """Add the counts of a batch. `per_position` is empty for trees, whose nodes have no position in a chain."""
        self.verifications += verifications
        self.drafted += drafted
        self.accepted += accepted
        old = self.accepted_per_position or [0] * len(per_position)
        self.accepted_per_position = [a + b for a, b in zip(old, per_position, strict=True)]

    @property
    def tau(self) -> float:
        return 1.0 + (self.accepted / self.verifications if self.verifications else 0.0)

    @property
    def nodes(self) -> float | None:
        """Drafted tokens per verification."""
        return self.drafted / self.verifications if self.verifications else None

    @property
    def n_alpha(self) -> list[float]:
        reached = [self.verifications, *self.accepted_per_position]
        return [now / before for before, now in zip(reached, reached[1:], strict=False) if before]

    @property
    def tokens_per_s(self) -> float | None:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count_chain(accepted: Iterable[int], length: int) -> list[int]:
    """accepted_per_position for chains of `length` tokens, from the number of accepted tokens of each verification."""
    counts = list(accepted)
    return [sum(count > position for count in counts) for position in range(length)]


def covered_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def repeated_4grams(answers: Iterable[Sequence[int]]) -> float:
    """Share of 4-grams that occurred before in the same answer, averaged over answers. Repetitions increase tau."""
    shares = []
    for tokens in answers:
        grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return fmean(shares) if shares else 0.0


def result_rows(runs: Sequence[TaskRun], greedy: bool) -> list[dict[str, Any]]:
    """The `results` of the JSON: a row per mode and task, and a `mean` row per mode (mean over its tasks).

    `speedup`, `exact_match` and `identical` compare with the mode `none` on the same task. They are null without that
    mode, and the last two are null for sampled answers. `exact_match` is the share of answers that are equal token by
    token, and `identical` says whether all are. `tau_without_graft` is the tau of the same mode without grafts, null
    for modes without grafts. `nodes` is the number of drafted tokens per verification.
    """
    base = {run.task: run for run in runs if run.mode == "none"}
    taus = {(run.mode + GRAFT, run.task): run.tau for run in runs}
    rows: list[dict[str, Any]] = []
    for mode in dict.fromkeys(run.mode for run in runs):
        of_mode = [
            _row(run, base.get(run.task), greedy) | {"tau_without_graft": taus.get((mode, run.task))}
            for run in runs
            if run.mode == mode
        ]
        rows += [*of_mode, _mean(mode, of_mode)]
    return rows


def _row(run: TaskRun, base: TaskRun | None, greedy: bool) -> dict[str, Any]:
    answers = [answer for turns in run.answers.values() for answer in turns]
    exact = speedup = None
    if base is not None:
        if greedy:
            same = [
                answer == plain
                for id, turns in base.answers.items()
                for answer, plain in zip(run.answers[id], turns, strict=True)
            ]
            exact = fmean(same)
        if run.tokens_per_s and base.tokens_per_s:
            speedup = run.tokens_per_s / base.tokens_per_s
    return {
        "mode": run.mode, "task": run.task, "tau": run.tau, "n_alpha": run.n_alpha,
        "tokens_per_s": run.tokens_per_s, "speedup": speedup,
        "identical": None if exact is None else exact == 1.0, "exact_match": exact,
        "verifications": run.verifications, "nodes": run.nodes,
        "answers": len(answers), "answer_tokens": sum(map(len, answers)),
        "repeated_4grams": repeated_4grams(answers),
    }  # fmt: skip


def _mean(mode: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [row[name] for row in rows]
        return None if None in values else fmean(values)

    n_alpha = [fmean(column) for column in zip(*(row["n_alpha"] for row in rows), strict=False)]
    same = [row["identical"] for row in rows]
    return {
        "mode": mode, "task": "mean", "tau": mean("tau"), "n_alpha": n_alpha,
        "tokens_per_s": mean("tokens_per_s"), "speedup": mean("speedup"),
        "identical": None if None in same else all(same), "exact_match": mean("exact_match"),
        **{name: sum(row[name] for row in rows) for name in ("verifications", "answers", "answer_tokens")},
        **{name: mean(name) for name in ("nodes", "tau_without_graft", "repeated_4grams")},
    }  # fmt: skip
