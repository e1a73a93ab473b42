"""`vllm-eagle3 doctor`: a verdict, then the facts for a bug report. With a draft, it checks that it fits its target."""

from __future__ import annotations

import argparse
import importlib
import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_eagle3 import plugin
from vllm_eagle3.config import cache_folder
from vllm_eagle3.log_files import log_file, quiet
from vllm_eagle3.user_input import UserError, check_model

NOT_REPLACED = "NOT replaced"
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
GB = 10**9


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    label: str
    text: str
    remedy: str | None = None
    """What to do about it; None if nothing is wrong."""


def add_parser(subparsers: Any) -> None:
    """Add the `doctor` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this installation, and a draft against its target",
        description="Prints 'ready' or what to do, then facts for a bug report. Exit code 1 if something is wrong.",
    )
    parser.add_argument("--target", metavar="DIR", help="with --draft: does the draft fit this target?")
    parser.add_argument("--draft", metavar="DIR", help="with --target")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the verdict and the findings. Returns 1 if something is wrong.

    Raises:
        UserError: one of --target and --draft is missing or is not a model's directory.
    """
    if bool(arguments.target) != bool(arguments.draft):
        raise UserError("--target and --draft: expected both or none of them")
    for option in ("target", "draft"):
        if getattr(arguments, option):
            check_model(getattr(arguments, option), f"--{option}")
    findings = list(examine())
    if arguments.draft:
        findings += probed(arguments.target, arguments.draft)
    remedies = [finding.remedy for finding in findings if finding.remedy]
    for line in remedies or ["ready"]:
        print(line)
    print()
    for finding in findings:
        print(f"{finding.label:14} {finding.text}")
    return int(bool(remedies))


def examine() -> Iterator[Finding]:
    """Everything about this installation."""
    from vllm_eagle3.provenance import device, versions

    for name, version in versions().items():
        yield Finding(name, version)
    yield Finding("device", ", ".join(f"{k} {v}" for k, v in device().items()))
    yield _cpu_flags()
    yield _compiler()
    yield _cost_files()
    state = _plugin()
    yield state
    if state.remedy or not state.text.startswith("on"):
        return
    yield _memory()
    yield Finding("runner", _runner())
    yield from _ledger()
    yield _vllm_serve()


def _cpu_flags() -> Finding:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    words = set(
        next((line.split() for line in text.splitlines() if line.startswith(("flags", "Features"))), [])
    )
    return Finding("instructions", " ".join(flag for flag in CPU_FLAGS if flag in words) or "unknown")


def _compiler() -> Finding:
    import torch

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        remedy = None if torch.cuda.is_available() else "Install g++ or clang++."
        return Finding("compiler", "none: no torch.compile and no native kernels on a CPU", remedy)
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return Finding("compiler", (done.stdout.splitlines() or [compiler])[0])


def _cost_files() -> Finding:
    folder = cache_folder() / "cost"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding(
            "cost files", f"{folder} cannot be written", f"Make {existing} a folder that may be written."
        )
    return Finding("cost files", f"{len(list(folder.glob('*.json')))} in {folder}")


def _plugin() -> Finding:
    if os.environ.get(plugin.DISABLE) == "1":
        return Finding(
            "plugin", f"off: {plugin.DISABLE}=1", f"Unset {plugin.DISABLE}, which switches the plugin off."
        )
    found = plugin.vllm_version()
    if not plugin.is_supported(found):
        text = f"off: supports {plugin.SUPPORTED_TEXT}, found {found or 'no vLLM'}"
        return Finding("plugin", text, f"Install {plugin.SUPPORTED_TEXT}.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "eagle3" not in allowed.split(","):
        text = f"off: VLLM_PLUGINS={allowed!r} leaves out 'eagle3'"
        return Finding("plugin", text, "Add eagle3 to VLLM_PLUGINS.")
    return Finding("plugin", f"on, for {plugin.SUPPORTED_TEXT}")


def _memory() -> Finding:
    from vllm_eagle3.runner.engine_memory import free_memory

    memory = free_memory()
    text = f"{memory.free / GB:.1f} of {memory.total / GB:.1f} GB free ({memory.place})"
    if memory.free < 0.92 * memory.total:
        text += "; vLLM's default wants 92 %: serve with --kv-cache-memory-bytes or --gpu-memory-utilization"
    return Finding("memory", text)


def _runner() -> str:
    from vllm_eagle3.runner.hooks.native_v2 import has_cpu_forms
    from vllm_eagle3.runner.triton_interpreter import triton_is_usable

    choice = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if choice == "0":
        return "V1 (VLLM_USE_V2_MODEL_RUNNER=0)"
    if not triton_is_usable() and not has_cpu_forms():
        return "V1 (Triton has no backend for this device): chains only"
    return "V2" + (
        " (VLLM_USE_V2_MODEL_RUNNER=1)" if choice == "1" else " where vLLM supports the model on it"
    )


def _ledger() -> Iterator[Finding]:
    """Check the replaced names and the other parts of vLLM that this project uses. One line for each misfit."""
    from vllm_eagle3.runner.calls import CALLED
    from vllm_eagle3.runner.ledger import PATCHES, install
    from vllm_eagle3.runner.overrides import SUBCLASSES

    install()
    others = {*CALLED, *(part for subclass in SUBCLASSES for part in subclass.overrides)}
    misfits = [
        f"{patch.module}.{patch.name}: {_fits(patch.upstream.fits())}, {replaced}"
        for patch in PATCHES
        if (replaced := _replaced(patch)) == NOT_REPLACED or not patch.upstream.fits()
    ]
    misfits += [f"{part.defined_in}.{part.qualname}: {_fits(False)}" for part in others if not part.fits()]
    total = len(PATCHES) + len(others)
    remedy = f"Install {plugin.SUPPORTED_TEXT}: this vLLM differs from what the plugin was written for."
    yield Finding(
        "ledger", f"{total - len(misfits)} of {total} entries fit this vLLM", remedy if misfits else None
    )
    for misfit in sorted(misfits):
        yield Finding("", misfit)


def _fits(fits: bool) -> str:
    return "fits" if fits else "DIFFERS from what this version was written for"


def _replaced(patch: Any) -> str:
    try:
        module = importlib.import_module(patch.module)
    except ImportError as error:
        return f"not importable here ({error})"
    target, name = patch.replacement.split(":")
    done = operator.attrgetter(patch.name)(module) is getattr(importlib.import_module(target), name)
    return "replaced" if done else NOT_REPLACED


def _vllm_serve() -> Finding:
    """Whether vLLM's command line starts. `vllm --version` runs the same code as `vllm serve` up to its options."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Finding("vllm serve", f"starts (vllm --version: {done.stdout.split()[-1]})")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding("vllm serve", f"does NOT start: {last}", f"Mend vLLM's command line: {last}")


def probed(target: str, draft: str) -> Iterator[Finding]:
    """Whether the draft fits the target (evaluation/probe.py)."""
    from vllm_eagle3.evaluation.probe import probe, verdict

    with quiet(log_file("doctor")):
        found = probe(target, draft)
    fits, text = verdict(found)
    yield Finding("draft", text, None if fits else f"The draft does not fit its target: {text}.")
    for layers, share in found.items():
        yield Finding("", f"layers {', '.join(map(str, layers))}: {share:.2f}")
