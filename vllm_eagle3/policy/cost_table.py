"""A step cost model from a few timed steps, and its JSON form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import median
from typing import Any

from vllm_eagle3.policy.cost import Curve, StepCostModel, interpolate


@dataclass(frozen=True)
class TimedStep:
    """One step in which `requests` requests had `tokens` tokens, and drafted as much as they may."""

    tokens: int
    requests: int
    target: float  # seconds of the target's forward pass
    draft: float  # seconds of drafting: the pass over the tokens and all draft steps


def cost_table(steps: Iterable[TimedStep], depth: int, width: int = 1) -> StepCostModel:
    """The model of an engine, from steps that drafted `depth` levels of `width` nodes a request each.

    Steps of equal size are repetitions: their median counts. Times grow with size; what a larger step seems to save is
    noise. The pass over the tokens of a step takes as long as a draft step where each request has one token, and is
    what the drafting takes beyond that elsewhere. Raises ValueError without a step of one token a request.
    """
    sizes: dict[tuple[int, int], list[TimedStep]] = {}
    for step in steps:
        sizes.setdefault((step.tokens, step.requests), []).append(step)
    target: Curve = {}
    drafting: dict[tuple[int, int], float] = {}
    for size, same in sorted(sizes.items()):
        target[size[0]] = median(step.target for step in same)
        drafting[size] = median(step.draft for step in same)
    single = {tokens: seconds / depth for (tokens, rows), seconds in drafting.items() if tokens == rows}
    if not single:
        raise ValueError("cost table: expected a step of one token a request, found none")
    single = _growing(single)
    sync = dict(single)
    for (tokens, requests), seconds in drafting.items():
        if tokens > requests:
            sync[tokens] = seconds - (depth - 1) * interpolate(single, requests)
    draft = {rows * width: seconds for rows, seconds in single.items()}
    return StepCostModel({0: _growing(target)}, sync=_growing(sync), draft=draft)


def _growing(curve: Curve) -> Curve:
    """The curve, each value raised to the largest before it."""
    ordered = sorted(curve.items())
    return dict(zip([x for x, _ in ordered], accumulate((y for _, y in ordered), max), strict=True))


def to_json(model: StepCostModel) -> dict[str, Any]:
    """The curves of a model, for JSON."""
    return asdict(model)


def from_json(data: Mapping[str, Any]) -> StepCostModel:
    """A model from what `to_json` made and JSON turned into names. Raises ValueError, TypeError, KeyError otherwise."""

    def curve(points: Mapping[str, float]) -> Curve:
        return {int(size): float(seconds) for size, seconds in points.items()}

    return StepCostModel(
        {int(context): curve(points) for context, points in data["target"].items()},
        sync=curve(data["sync"]),
        draft=curve(data["draft"]),
        overhead=float(data["overhead"]),
    )
