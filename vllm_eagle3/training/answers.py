"""Lets the target answer the prompts before training, with a vLLM engine in a separate process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

from vllm_eagle3.log_files import EngineFailedError, log_file
from vllm_eagle3.training.ranks import Ranks
from vllm_eagle3.training.settings import Answers

logger = logging.getLogger(__name__)
TORCHRUN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def answer_prompts(answers: Answers, target: str, dtype: str, ranks: Ranks) -> None:
    """Let the target answer this rank's part of the prompts. Answers that exist already are kept.

    The engine runs in a separate process, so that its memory is free when training begins.

    Raises EngineFailedError when the engine fails; its log has the reason.
    """
    command = [sys.executable, "-m", "vllm_eagle3.training.generate", "--target", target, "--dtype", dtype]
    command += ["--out", str(answers.out), "--data", *map(str, answers.prompts)]
    command += [*answers.arguments, "--part", str(ranks.rank), "--parts", str(ranks.world)]
    log = log_file("answers")
    command += ["--log", str(log)]
    logger.info("answering prompts: %s", " ".join(command))
    done = subprocess.run(command, env=engine_environment(ranks), check=False)
    if done.returncode:
        text = f"answering the prompts failed with exit code {done.returncode}: {' '.join(command)}"
        raise EngineFailedError(text, log)


def engine_environment(ranks: Ranks) -> dict[str, str]:
    """The environment for the engine: without torchrun's variables, and with one GPU for each rank of the host."""
    found = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    if ranks.device.startswith("cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        found["CUDA_VISIBLE_DEVICES"] = visible.split(",")[ranks.local] if visible else str(ranks.local)
    elif ranks.world > 1:
        found.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return found
