"""Fixtures of all tests.

`tests/runner/v2` needs Model Runner V2 and a separate process: see tests/runner/v2/conftest.py.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

for name, value in {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(name, value)
# Shared helpers (closed_form, engines, ...) stand beside this file.
sys.path.insert(0, str(Path(__file__).parent))

from vllm_eagle3.runner import triton_interpreter  # noqa: E402

if triton_interpreter.enabled():
    triton_interpreter.install()


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """`engine(model_dir, **LLM kwargs)`: a vLLM engine that is shut down after the test."""
    from engines import running

    with ExitStack() as stack:
        yield lambda model, **kwargs: stack.enter_context(running(model, **kwargs))


@pytest.fixture(scope="session")
def closed_form_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Closed-form target checkpoint (tests/closed_form.py)."""
    from closed_form import write_target

    return write_target(tmp_path_factory.mktemp("closed_form") / "target")


@pytest.fixture(scope="session")
def closed_form_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Closed-form draft that is wrong on multiples of 5."""
    from closed_form import write_draft

    return write_draft(tmp_path_factory.mktemp("closed_form") / "draft")
