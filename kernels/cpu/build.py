"""Compiles the C++ kernels of this folder on first use and keeps the library in a cache folder.

The library has a plain C interface (pointers and numbers in a struct) and includes no header of torch. So it compiles
in seconds and does not depend on torch's version. It shares torch's OpenMP threads.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from vllm_eagle3.config import cache_folder

logger = logging.getLogger("vllm.eagle3")

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
TIMEOUT = 300  # seconds


@cache
def native() -> ctypes.CDLL | None:
    """The compiled kernels. If they cannot be compiled: None, after one warning with the reason.

    The first process that calls this compiles them; other processes wait. EAGLE3_NATIVE=0 switches the kernels off.
    """
    if os.environ.get("EAGLE3_NATIVE", "1") == "0":
        logger.warning("EAGLE3_NATIVE=0: draft trees use torch operations instead of native CPU kernels")
        return None
    try:
        return ctypes.CDLL(str(_library()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home directory
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning(
            "no native CPU kernels, draft trees use slower torch operations: %s",
            detail[0] if detail else error,
        )
        return None


def _library() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found (g++ or clang++; CXX names another)")
    sources = sorted(SOURCES.glob("*.cpp"))
    target = "-mcpu=native" if platform.machine() in ("aarch64", "arm64", "ppc64le") else "-march=native"
    omp = _loaded_openmp()
    command = [compiler, *FLAGS, target, "-fopenmp", *map(str, sources)]
    identity = hashlib.sha256(repr((command, omp, _cpu(), _version(compiler))).encode())
    for file in sorted((*sources, *SOURCES.glob("*.h"))):
        identity.update(file.read_bytes())
    folder = cache_folder() / "native"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"kernels-{identity.hexdigest()[:16]}.so"
    if not library.exists():
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(command, omp, library)
    return library


def _compile(command: list[str], omp: str | None, library: Path) -> None:
    """Compile the kernels and write `library` in one atomic step."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        # Link with the OpenMP library that torch has loaded, so that the process has one pool of threads.
        with_openmp = [*command, *([omp] if omp else []), "-o", str(made)]
        without = [*(part for part in command if part != "-fopenmp"), "-o", str(made)]
        done = subprocess.run(with_openmp, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            logger.warning("%s builds no OpenMP program: the native CPU kernels use one thread", command[0])
            subprocess.run(without, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        made.replace(library)


def _loaded_openmp() -> str | None:
    """Path of the OpenMP library in this process, if the system can tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    return next((p for p in sorted(paths) if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))), None)


def _cpu() -> str:
    """The CPU that the library is compiled for. It is part of the file's name, as machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({x for x in lines if x.startswith(("flags", "Features", "isa", "model name"))}))


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT).stdout
