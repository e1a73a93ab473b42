"""Compile every Triton launch of a callable for a Hopper GPU (sm_90), with no GPU at hand.

`JITFunction.run` is replaced by a recorder: it reads the kernel's signature off the real call (dtypes,
16-byte divisibility, constexprs) and hands it to Triton's compiler and its bundled ptxas. Tensors may be on
"meta".
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What came out of one launch: name, PTX text, shared memory in bytes, registers, spilled bytes
    (stack)."""

    name: str
    ptx: str
    shared: int
    registers: int
    stack: int


def _describe(value: object, path: tuple[int, ...], consts: dict, attrs: dict) -> object:
    if isinstance(value, tuple):
        return tuple(_describe(v, (*path, i), consts, attrs) for i, v in enumerate(value))
    if isinstance(value, torch.Tensor):
        attrs[path] = [["tt.divisibility", 16]]
        return TYPES[value.dtype]
    if isinstance(value, int) and not isinstance(value, bool) and value != 1:
        if value % 16 == 0:
            attrs[path] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    consts[path] = value
    return "constexpr"


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


@contextmanager
def recording():
    """Within it every launch is compiled for sm_90 instead of run; yields the list of `Compiled`."""
    done: list[Compiled] = []

    def run(self: JITFunction, *args, grid, warmup=False, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        bound = self.signature.bind(*args, **kwargs).arguments
        consts: dict = {}
        attrs: dict = {}
        signature = {}
        for i, param in enumerate(self.params):
            value = bound[param.name]
            if param.is_constexpr:
                signature[param.name], consts[(i,)] = "constexpr", value
            else:
                signature[param.name] = _describe(value, (i,), consts, attrs)
        source = ASTSource(fn=self, signature=signature, constexprs=consts, attrs=attrs)
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        done.append(Compiled(self.fn.__name__, kernel.asm["ptx"], kernel.metadata.shared,
                             *_resources(kernel.asm["cubin"])))  # fmt: skip

    with mock.patch.object(JITFunction, "run", run):
        yield done


def compile_launches(call: Callable[[], object]) -> list[Compiled]:
    """Compiled kernels of every launch that `call()` makes."""
    with recording() as done:
        call()
    return done
