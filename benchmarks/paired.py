"""Engines that take turns, as the benchmarks of throughput on a CPU compare them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from vllm_eagle3.evaluation.sweep.report import bootstrap_median
from vllm_eagle3.evaluation.sweep.run import Worker, measure_in_turn
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.evaluation.sweep.worker import Measurement

Found = dict[tuple[str, int], list[Measurement]]
"""The runs of an engine at a batch size, in order."""


def engine(name: str, mode: str, file: Path, runner: str = "1") -> Worker:
    """An engine of the sweep's mode with the settings in `file`, which results call `name`.

    runner: of vLLM, "0" for V1 and "1" for V2.
    """
    worker = Worker(mode, mode, file, {"VLLM_USE_V2_MODEL_RUNNER": runner, "EAGLE3_DISABLE": "0"})
    worker.name = name  # a sweep names engines by their mode, of which two may be the same here
    return worker


def repeats(workers: list[Worker], settings: SweepSettings) -> Iterator[Found]:
    """Measure all engines in turn. Yields all runs so far after each repeat; the warm-up is not among them."""
    found: Found = defaultdict(list)
    for repeat, measurements in groupby(measure_in_turn(workers, settings), key=itemgetter(0)):
        for _, worker, size, measured in measurements:
            if repeat:
                found[worker.name, size].append(measured)
        if repeat:
            yield found


def compared(size: int, found: Found, pairs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The engines at one batch size: tokens/s, tau, and the ratios of tokens/s within each repeat.

    pairs: name of a ratio -> its two engines. A pair of which one was not measured is left out.
    """
    runs = {name: of_engine for (name, batch), of_engine in found.items() if batch == size}
    rates = {name: [run.tokens / run.seconds for run in of_engine] for name, of_engine in runs.items()}
    ratios = {
        pair: [x / y for x, y in zip(rates[a], rates[b], strict=True)]
        for pair, (a, b) in pairs.items()
        if a in runs and b in runs
    }
    return {
        "batch_size": size,
        "tokens_per_second": {name: median(values) for name, values in rates.items()},
        "tau": {
            name: 1 + sum(run.accepted for run in of_engine) / max(sum(run.drafts for run in of_engine), 1)
            for name, of_engine in runs.items()
        },
        "median": {pair: median(values) for pair, values in ratios.items()},
        "interval": {pair: bootstrap_median(values) for pair, values in ratios.items()},
        "ratios": ratios,
    }
