"""Tests of Model Runner V2. Without a GPU: `EAGLE3_INTERPRET=1 pytest tests/runner/v2`, in a process of its own.

vLLM decides once, at import, whether Triton is usable. So V1 engines and interpreted V2 engines cannot share a process.
"""

from pathlib import Path

import pytest
import torch

from vllm_eagle3.runner import triton_interpreter

if not (triton_interpreter.enabled() or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a draft of random weights (tests/random_llama.py)."""
    from random_llama import write_draft, write_target

    folder = tmp_path_factory.mktemp("random")
    return write_target(folder / "target"), write_draft(folder / "draft")
