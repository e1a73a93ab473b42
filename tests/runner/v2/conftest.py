"""Tests of Model Runner V2, in a separate process.

`VLLM_USE_V2_MODEL_RUNNER=1 pytest tests/runner/v2` runs them natively. `EAGLE3_INTERPRET=1 pytest tests/runner/v2`
runs those of Triton's kernels in Triton's interpreter, on a machine without a GPU.

vLLM decides once, at its import, whether it can use Triton. So native and interpreted engines cannot share a process.
"""

import os
from pathlib import Path

import pytest
import torch

from vllm_eagle3.runner import triton_interpreter

asked_for = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
if not (asked_for or triton_interpreter.enabled() or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]
elif not (triton_interpreter.enabled() or torch.cuda.is_available()):
    collect_ignore = [
        f"test_{name}.py"
        for name in ("gpu_kernels", "gpu_startup", "graphs", "interpreter", "tree_flash_attention")
    ]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft of random weights (tests/random_llama.py)."""
    from random_llama import write_draft, write_target

    folder = tmp_path_factory.mktemp("random")
    return write_target(folder / "target"), write_draft(folder / "draft")
