"""What this project's own code launches in a step, and whether it waits for the device: every torch operation is seen.

An operation belongs to the file of vLLM or of this project that is innermost on the stack.
"""

import linecache
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vllm_eagle3

OURS = str(Path(vllm_eagle3.__file__).parent)
WAITS = (torch.ops.aten.item, torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
NEW_MEMORY = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like)
INDEXES = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def owner() -> tuple[str, str]:
    """File and line of source that an operation comes from."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/triton/" in name:  # its interpreter copies what a kernel is launched with
            return "", ""
        if name.startswith(OURS) or "/vllm/" in name:
            return name, linecache.getline(name, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return "", ""


class Launches(TorchDispatchMode):
    """Counts the operations of each of this project's files that are kernels on a GPU: all but views and new memory.

    AssertionError on one that waits for the device there. Reading what vLLM keeps on the host, in tensors whose names
    end in `_cpu` or in `_cpu_upper_bound`, does not; nor does a line that asks whether the device is a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, line = owner()
        if name.startswith(OURS):
            of_the_host = "_cpu" in line or '"cpu"' in line or f"{OURS}/runner/v2/cpu/" in name
            by_mask = func._overloadpacket in INDEXES and any(
                isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
            )
            if (func._overloadpacket in WAITS or by_mask) and not of_the_host:
                raise AssertionError(f"{func} waits for the device: {name}: {line.strip()}")
            if not func.is_view and func._overloadpacket not in (*WAITS, *NEW_MEMORY):
                self.counts[name.removeprefix(f"{OURS}/")] += 1
        return func(*args, **(kwargs or {}))
