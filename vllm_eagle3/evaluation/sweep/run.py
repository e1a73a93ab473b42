"""Throughput at fixed concurrency: one running engine per mode. The engines are measured in turn, several times."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_eagle3.evaluation.engine_process import EngineProcess
from vllm_eagle3.evaluation.evaluate import environment
from vllm_eagle3.evaluation.model_shapes import write_shape
from vllm_eagle3.evaluation.sweep.report import Runs, result_rows
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.evaluation.sweep.worker import Measurement
from vllm_eagle3.log_files import log_file, quiet
from vllm_eagle3.provenance import provenance


class Worker(EngineProcess):
    """The process of one engine of a sweep. It starts at once and is waited for before it is first asked.

    Args:
        name: of the engine, see SweepSettings.runs.
        mode: of the sweep.
        settings: file of the SweepSettings.
        variables: of the environment, beside those that the mode needs.
        log: file for what the process writes; None: a new one.
    """

    def __init__(
        self,
        name: str,
        mode: str,
        settings: Path,
        variables: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        env = environment("native" if mode == "adaptive" else mode)
        env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        env |= variables or {}
        module = "vllm_eagle3.evaluation.sweep.worker"
        super().__init__(name, module, [name, str(settings)], env, log or log_file("sweep"))
        self.ready = False

    def wait(self) -> None:
        """Return once the engine is ready.

        Raises:
            EngineFailedError: the process ended.
            RuntimeError: it found too little memory.
        """
        if not self.ready:
            self.reply()
            self.ready = True

    def ask(self, command: Mapping[str, Any]) -> None:
        """Give the engine a command, see the worker's module."""
        self.wait()
        self.send(command)

    def measure(self, batch_size: int, turn: int) -> Measurement:
        """One run (see SweepEngine.run)."""
        self.ask({"measure": [batch_size, turn]})
        return Measurement(**self.reply())


def measure_in_turn(
    workers: list[Worker], settings: SweepSettings
) -> Iterator[tuple[int, Worker, int, Measurement]]:
    """(repeat, engine, batch size, measurement); repeat 0 is for warming up.

    Within a repeat every batch size is measured with each engine in turn, beginning with another engine every time, so
    that what else the machine does in the meantime affects all of them.
    """
    for repeat in range(settings.repeats + 1):
        first = repeat % len(workers)
        for batch_size in settings.batch_sizes:
            for worker in workers[first:] + workers[:first]:
                yield repeat, worker, batch_size, worker.measure(batch_size, repeat)


def sweep(settings: SweepSettings, save: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """{"provenance", "results"} (see report.result_rows), which is also passed to `save` after each repeat.

    Raises:
        RuntimeError: an engine died.
        ValueError: synthetic acceptance without a GPU.
    """
    synthetic = settings.shape is not None and bool(settings.acceptance_rates)
    if synthetic and not torch.cuda.is_available():
        raise ValueError(
            "--shape: vLLM's synthetic acceptance needs a GPU, found none; --dry-run does without"
        )
    origin = provenance(settings.data, settings.public() | {"synthetic_acceptance": synthetic})
    runs: Runs = {}
    log = log_file("sweep")
    with ExitStack() as stack:
        stack.enter_context(quiet(log))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if settings.shape is not None:
            target, draft = write_shape(settings.shape, folder)
            settings = replace(settings, target=str(target), draft=str(draft))
        file = folder / "settings.json"
        file.write_text(settings.to_json(), encoding="utf-8")
        workers = []
        for name, mode, _ in tqdm(settings.runs(), desc="starting engines", unit="engine"):
            workers.append(Worker(name, mode, file, log=log))
            stack.callback(workers[-1].close)
            workers[-1].wait()
        total = (settings.repeats + 1) * len(settings.batch_sizes) * len(workers)
        with tqdm(total=total, desc="measuring", unit="run") as bar:
            for repeat, worker, batch_size, found in measure_in_turn(workers, settings):
                if repeat:
                    runs.setdefault((worker.name, batch_size), []).append(found)
                speed = found.tokens / found.seconds
                bar.set_postfix_str(f"repeat {repeat}, {worker.name} at {batch_size}: {speed:.0f} tokens/s")
                bar.update()
                if repeat and save is not None and bar.n % (total // (settings.repeats + 1)) == 0:
                    save({"provenance": origin, "results": result_rows(runs)})
    sys.stderr.write(f"log of the engines: {log}\n")
    return {"provenance": origin, "results": result_rows(runs)}
