"""`vllm-eagle3 doctor`: versions, device, runner, and whether the names that this project replaces fit this vLLM."""

import argparse
import importlib
import operator
import os
from typing import Any

from vllm_eagle3 import plugin

NOT_REPLACED = "NOT replaced"


def add_parser(subparsers: Any) -> None:
    """Add the `doctor` command."""
    parser = subparsers.add_parser("doctor", help="check this installation and say what would be used")
    parser.set_defaults(func=lambda args: run(args))


def run(_: argparse.Namespace) -> int:
    """Print the findings; 1 when something would keep the plugin from working."""
    from vllm_eagle3.provenance import device, versions

    for name, version in versions().items():
        print(f"{name:14} {version}")
    print(f"{'device':14} {', '.join(f'{k} {v}' for k, v in device().items())}")
    if os.environ.get(plugin.DISABLE) == "1":
        print(f"{'plugin':14} off: {plugin.DISABLE}=1")
        return 0
    found = plugin.vllm_version()
    if not plugin.is_supported(found):
        print(f"{'plugin':14} off: supports {plugin.SUPPORTED_TEXT}, found {found or 'no vLLM'}")
        return 1
    if not _entry_point_allowed():
        print(f"{'plugin':14} off: VLLM_PLUGINS={os.environ['VLLM_PLUGINS']!r} leaves out 'eagle3'")
        return 0
    print(f"{'plugin':14} on, for {plugin.SUPPORTED_TEXT}")
    print(f"{'runner':14} {_runner()}")
    return _ledger()


def _entry_point_allowed() -> bool:
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or "eagle3" in allowed.split(",")


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


def _ledger() -> int:
    from vllm_eagle3.runner.calls import CALLED
    from vllm_eagle3.runner.ledger import PATCHES, install
    from vllm_eagle3.runner.overrides import SUBCLASSES

    install()
    misfits = 0
    for patch in PATCHES:
        fits, replaced = patch.upstream.fits(), _replaced(patch)
        misfits += not fits or replaced == NOT_REPLACED
        print(f"  {patch.module}.{patch.name}: {_verdict(fits)}, {replaced}")
    others = {*CALLED, *(part for subclass in SUBCLASSES for part in subclass.overrides)}
    for upstream in sorted(others, key=lambda upstream: (upstream.defined_in, upstream.qualname)):
        if not upstream.fits():
            misfits += 1
            print(f"  {upstream.defined_in}.{upstream.qualname}: {_verdict(False)}")
    total = len(PATCHES) + len(others)
    print(f"{'ledger':14} {total - misfits} of {total} entries fit this vLLM")
    return int(misfits > 0)


def _verdict(fits: bool) -> str:
    return "fits" if fits else "DIFFERS from what this version was written for"


def _replaced(patch: Any) -> str:
    try:
        module = importlib.import_module(patch.module)
    except ImportError as error:
        return f"not importable here ({error})"
    target, name = patch.replacement.split(":")
    done = operator.attrgetter(patch.name)(module) is getattr(importlib.import_module(target), name)
    return "replaced" if done else NOT_REPLACED
