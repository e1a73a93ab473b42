"""Throughput at fixed concurrency: one running engine per mode. The engines are measured in turn, several times."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_eagle3.evaluation.evaluate import environment
from vllm_eagle3.evaluation.model_shapes import write_shape
from vllm_eagle3.evaluation.sweep.report import Runs, result_rows
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.evaluation.sweep.worker import Measurement
from vllm_eagle3.provenance import provenance


class Worker:
    """The process of one engine. Raises RuntimeError if it ends early; its messages are on stderr."""

    def __init__(
        self, name: str, mode: str, settings: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        """variables: environment variables in addition to those of the mode."""
        self.name = name
        command = [sys.executable, "-m", "vllm_eagle3.evaluation.sweep.worker", name, str(settings)]
        env = environment("native" if mode == "adaptive" else mode)
        env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        env |= variables or {}
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"the engine {self.name!r} died with exit code {code}; see its messages above")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"the engine {self.name!r}: {reply['error']}")
        return reply

    def measure(self, batch_size: int, turn: int) -> Measurement:
        """Measure one run (see SweepEngine.run)."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{batch_size} {turn}\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # then there is no reply either
            pass
        return Measurement(**self._reply())

    def close(self) -> None:
        """Close the input of the process, which ends it; kill it if it does not end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def sweep(settings: SweepSettings, save: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """{"provenance", "results"} (see report.result_rows), which is also passed to `save` after each repeat.

    Within a repeat, each batch size is measured with all engines in turn. Each time another engine begins, so that
    changes of the machine's load affect all of them. The first repeat is a warm-up and is not counted.

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
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if settings.shape is not None:
            target, draft = write_shape(settings.shape, folder)
            settings = replace(settings, target=str(target), draft=str(draft))
        file = folder / "settings.json"
        file.write_text(settings.to_json(), encoding="utf-8")
        workers = []
        for name, mode, _ in tqdm(settings.runs(), desc="starting engines", unit="engine"):
            workers.append(Worker(name, mode, file))
            stack.callback(workers[-1].close)
        total = (settings.repeats + 1) * len(settings.batch_sizes) * len(workers)
        with tqdm(total=total, desc="warm-up", unit="run") as bar:
            for repeat in range(settings.repeats + 1):
                first = repeat % len(workers)
                for batch_size in settings.batch_sizes:
                    for worker in workers[first:] + workers[:first]:
                        found = worker.measure(batch_size, repeat)
                        if repeat:
                            runs.setdefault((worker.name, batch_size), []).append(found)
                        bar.set_postfix_str(
                            f"{worker.name} at {batch_size}: {found.tokens / found.seconds:.0f}/s"
                        )
                        bar.update()
                bar.set_description(f"repeat {repeat + 1}")
                if repeat and save is not None:
                    save({"provenance": origin, "results": result_rows(runs)})
    return {"provenance": origin, "results": result_rows(runs)}
