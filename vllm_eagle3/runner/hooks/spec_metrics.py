"""Statistics of drafting for operators: Prometheus series and a log line, in addition to vLLM's own of speculation.

This project's scheduler fills an `Eagle3Stats` in each step. It is sent to the front end in place of vLLM's statistics
of speculation. There, subclasses of vLLM's two classes that show these statistics receive it. `LLM.get_metrics()`,
`/metrics` and the periodic log lines read from them.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingProm, SpecDecodingStats, logger

SERIES = {
    "vllm:eagle3_steps": "Steps of the engine, by the shape that each request was told to draft.",
    "vllm:eagle3_step_seconds": "Seconds of those steps, by the same shape.",
    "vllm:eagle3_drafted_tokens": "Drafts that were verified, by depth (of a tree: by node).",
    "vllm:eagle3_accepted_paths": "Verifications, by how many drafts they accepted.",
    "vllm:eagle3_graft_tokens": "Tokens of grafts, verified and accepted. vLLM's own series hold all drafts.",
    "vllm:eagle3_fallbacks": "Requests or steps that drafted less than they could, by reason.",
}
"""Counters: Prometheus adds `_total` to their names."""
LABELS = {
    "vllm:eagle3_steps": "shape",
    "vllm:eagle3_step_seconds": "shape",
    "vllm:eagle3_drafted_tokens": "depth",
    "vllm:eagle3_accepted_paths": "length",
    "vllm:eagle3_graft_tokens": "kind",
    "vllm:eagle3_fallbacks": "reason",
}
"""The label of each series beside vLLM's own (model_name, engine)."""


@dataclass
class Eagle3Stats(SpecDecodingStats):
    """vLLM's statistics of a step, and those of this project's scheduler. Keys are the values of the series' labels."""

    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    paths: dict[str, int] = field(default_factory=dict)
    grafts: dict[str, int] = field(default_factory=dict)

    def observe_draft(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        super().observe_draft(num_draft_tokens, num_accepted_tokens)
        length = str(num_accepted_tokens)
        self.paths[length] = self.paths.get(length, 0) + 1

    def labelled(self) -> dict[str, Mapping[str, float]]:
        """The amounts to add, by series and label."""
        return {
            "vllm:eagle3_steps": self.steps,
            "vllm:eagle3_step_seconds": self.seconds,
            "vllm:eagle3_drafted_tokens": {
                str(depth): n for depth, n in enumerate(self.num_draft_tokens_per_pos, 1) if n
            },
            "vllm:eagle3_accepted_paths": self.paths,
            "vllm:eagle3_graft_tokens": self.grafts,
            "vllm:eagle3_fallbacks": self.fallbacks,
        }


class Eagle3Prom(SpecDecodingProm):
    """vLLM's series of speculation, and this project's."""

    def __init__(
        self,
        speculative_config: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(speculative_config, labelnames, per_engine_labelvalues, *args, **kwargs)
        self._engines = per_engine_labelvalues
        self._series: dict[str, Any] = {}
        # By series, engine and label, because looking them up is slow.
        self._counters: dict[tuple[str, int, str], Any] = {}
        if speculative_config is not None and speculative_config.method == "eagle3":
            self._series = {
                name: self._counter_cls(name=name, documentation=text, labelnames=[*labelnames, LABELS[name]])
                for name, text in SERIES.items()
            }

    def observe(self, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
        super().observe(spec_decoding_stats, engine_idx)
        if not self._series or not isinstance(spec_decoding_stats, Eagle3Stats):
            return  # another method, or a scheduler of the user's
        for name, values in spec_decoding_stats.labelled().items():
            for label, amount in values.items():
                key = (name, engine_idx, label)
                if key not in self._counters:
                    self._counters[key] = self._series[name].labels(*self._engines[engine_idx], label)
                self._counters[key].inc(amount)


class Eagle3Logging(SpecDecodingLogging):
    """vLLM's log line of speculation, and this project's line after it."""

    def reset(self) -> None:
        super().reset()
        self.totals: dict[str, Any] = {name: Counter() for name in SERIES}

    def observe(self, spec_decoding_stats: Any) -> None:
        if spec_decoding_stats.num_drafts:  # vLLM's line divides by it
            super().observe(spec_decoding_stats)
        if not isinstance(spec_decoding_stats, Eagle3Stats):
            return
        for name, values in spec_decoding_stats.labelled().items():
            self.totals[name].update(values)

    def log(self, log_fn: Callable[..., Any] = logger.info) -> None:
        totals = self.totals
        super().log(log_fn)  # which resets
        steps, fallbacks = totals["vllm:eagle3_steps"], totals["vllm:eagle3_fallbacks"]
        if steps:
            chosen = ", ".join(f"{shape} in {n}" for shape, n in steps.most_common())
            reasons = "".join(f"; {reason}: {n:g}" for reason, n in sorted(fallbacks.items()))
            log_fn("EAGLE-3 metrics: %d steps: %s%s", sum(steps.values()), chosen, reasons)
            self.reset()


def widen_stats(stats: ModuleType) -> None:
    """Let `SchedulerStats` contain an `Eagle3Stats` between processes: msgspec decodes a field by its annotation."""
    stats.SchedulerStats.__annotations__["spec_decoding_stats"] = Eagle3Stats | None
