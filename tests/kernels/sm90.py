"""Compiles every Triton launch of a callable for a Hopper GPU (sm_90) without a GPU.

`JITFunction.run` is replaced by a recorder. It takes the kernel's signature from the real call (dtypes, 16-byte
divisibility, constexprs) and passes it to Triton's compiler and its bundled ptxas. Tensors may be on "meta".
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
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


# Instructions of the half-rate ALU pipe, which integer arithmetic for addresses and masks uses.
ALU = re.compile(
    "BMSK|FLO|FMNMX|FSEL|FSET|FSETP|IABS|IADD3|IDP|IMNMX|ISETP|LEA|LOP3|PLOP3|PRMT|SEL|SHF|SHL|SHR|VIADD|VIMNMX"
)


@dataclass(frozen=True)
class Compiled:
    """The result of compiling one launch."""

    name: str
    ptx: str
    shared: int
    """Shared memory of a program in bytes."""
    registers: int
    """Of a thread."""
    stack: int
    """Spilled bytes of a thread."""
    threads: int
    """Of a program."""
    loops: list[tuple[int, int]]
    """Each loop with tensor-core products: its instructions, and how many of them the ALU pipe computes."""

    @property
    def programs_per_sm(self) -> int:
        """Programs that an SM of an H100 can hold.

        It has 228 KiB of shared memory (the system uses 1 KiB per program) and 65,536 registers, in units of 8 per
        thread.
        """
        registers = -(-self.registers // 8) * 8 * self.threads
        return min((228 << 10) // (self.shared + 1024), (1 << 16) // registers)


def describe(self: JITFunction, bound: dict[str, object]) -> tuple[dict[str, object], dict, dict]:
    """What Triton compiles a launch for: types by parameter, constants and properties of integers and pointers."""
    consts: dict = {}
    attrs: dict = {}
    signature: dict[str, object] = {}
    for i, param in enumerate(self.params):
        value = bound[param.name]
        if param.is_constexpr:
            signature[param.name], consts[(i,)] = "constexpr", value
        elif param.do_not_specialize:
            signature[param.name] = "i32"
        else:
            signature[param.name] = _describe(value, (i,), consts, attrs)
    return signature, consts, attrs


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


def _product_loops(cubin: bytes) -> list[tuple[int, int]]:
    """(instructions, ALU instructions) of every innermost loop of the machine code that holds a matrix product."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        tool = triton.knobs.nvidia.nvdisasm.path
        text = subprocess.run([tool, "-c", f.name], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?);", line):
            code.append(instruction[1])
            jump = re.search(r"^BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if jump and jump[1] in labels:
                body = [word.split()[0].split(".")[0] for word in code[labels[jump[1]] :]]
                if "HGMMA" in body or "HMMA" in body:
                    loops.append((len(body), sum(ALU.fullmatch(word) is not None for word in body)))
    return loops


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
def recording() -> Iterator[list[Compiled]]:
    """A context in which launches are compiled for sm_90 instead of run. Yields the list of `Compiled`."""
    done: list[Compiled] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        bound = self.signature.bind(*args, **kwargs).arguments
        signature, consts, attrs = describe(self, dict(bound))
        source = ASTSource(fn=self, signature=signature, constexprs=consts, attrs=attrs)
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        cubin = kernel.asm["cubin"]
        threads = 32 * options.get("num_warps", 4)
        done.append(Compiled(self.fn.__name__, kernel.asm["ptx"], kernel.metadata.shared, *_resources(cubin),
                             threads, _product_loops(cubin)))  # fmt: skip

    with mock.patch.object(JITFunction, "run", run):
        yield done


def compile_launches(call: Callable[[], object]) -> list[Compiled]:
    """The compiled kernels of all launches in `call()`."""
    with recording() as done:
        call()
    return done


# Long: a table.
def launches_of_8b_shapes() -> dict[str, Callable[[], object]]:
    """Every operation at the shapes of an 8B model, and the dtypes and forms that are compiled separately."""
    from vllm_eagle3 import kernels as k

    def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    h, vocab, i64, fp32, fp8 = 4096, 32000, torch.int64, torch.float32, torch.float8_e4m3fn
    head = of(vocab, h)
    d2t = of(vocab, dtype=i64)
    row = of(h)
    table = k.kv_table([torch.empty(4, 2, 16, 8, 128, dtype=torch.bfloat16)] * 2)
    slots = torch.zeros(2, 8, dtype=i64)

    def tree_attention(requests: int, rows: int, window: int = 0) -> object:
        tokens = requests * rows
        return k.tree_attention(
            of(tokens, 32, 128), of(999, 8, 16, 256),
            of(requests, 512, dtype=torch.int32), of(requests + 1, dtype=torch.int32),
            of(requests, dtype=torch.int32), *[of(tokens, dtype=i64)] * 3, max_query_len=rows, scale=0.1,
            window=window, backend="triton",
        )  # fmt: skip

    def node_attention(requests: int, rows: int) -> object:
        tokens = requests * rows
        return k.node_attention(
            of(tokens, 32, 128), of(999, 8, 16, 256), of(requests, 512, dtype=torch.int32),
            of(requests + 1, dtype=torch.int32), of(requests, dtype=torch.int32), *[of(tokens, dtype=i64)] * 3,
            max_query_len=rows, scale=0.1, backend="triton",
        )  # fmt: skip

    def path_attention(requests: int, length: int, window: int = 0) -> object:
        scratch = of(requests, 50, 8, 128)
        return k.path_attention(
            of(requests, 10, 32, 128), of(999, 8, 16, 256), of(requests, 512, dtype=torch.int32),
            of(requests, dtype=torch.int32), scratch, scratch, of(requests, 10, length, dtype=i64), scale=0.1,
            window=window, backend="triton",
        )  # fmt: skip

    def fc(n: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> object:
        states = [of(n, h, dtype=dtype)] * 3
        return k.concat_fc(states, of(h, 3 * h, dtype=dtype), backend="triton", **options)

    def growth() -> None:
        trees = k.TreeGrowth(6, 10, of(8, dtype=torch.bool), of(8, dtype=i64), 9999, torch.int32)
        for width in (1, 10, 10):
            rows = 8 * width
            trees.extend(of(rows, 10, dtype=fp32), of(rows, 10, dtype=i64), of(rows, h))
        trees.rerank(of(8, 60, dtype=i64), of(8, 60, dtype=i64))

    calls: dict[str, Callable[[], object]] = {
        "fc_1": lambda: fc(1),
        "fc_64": lambda: fc(64),
        "fc_norm_32": lambda: fc(32, norm_weights=[row] * 3),
        "fc_fp32": lambda: fc(64, fp32),
        "head_1": lambda: k.head_topk(of(1, h), head, 1, d2t=d2t, backend="triton"),
        "head_top10_64": lambda: k.head_topk(of(64, h), head, 10, d2t=d2t, backend="triton"),
        "head_fp8_64": lambda: k.head_topk(
            of(64, h), of(vocab, h, dtype=fp8), 10, d2t=d2t, weight_scale=of(vocab, dtype=fp32), backend="triton"
        ),
        "linear_fp8": lambda: k.linear_fp8(
            of(8, h), of(h, h, dtype=fp8), of(h, dtype=fp32), backend="triton"
        ),
        "growth": growth,
        "ancestor_bits": lambda: k.ancestor_bits(of(4, 61, dtype=i64), backend="triton"),
        "tree_walk": lambda: k.tree_walk(*[of(4, 61, dtype=i64)] * 3, backend="triton"),
        "tree_attention_1": lambda: tree_attention(1, 61),
        "tree_attention_64": lambda: tree_attention(64, 61),
        "tree_attention_window": lambda: tree_attention(8, 61, window=4096),
        "node_attention": lambda: node_attention(8, 61),
        "path_attention_1": lambda: path_attention(1, 1),
        "path_attention_64_window": lambda: path_attention(64, 5, window=4096),
        "commit_kv": lambda: k.commit_kv(table, slots, slots, backend="triton"),
    }  # fmt: skip
    return calls


def main() -> None:
    """Print the compiled kernels of all launches as JSON."""
    compiled = {name: compile_launches(call) for name, call in launches_of_8b_shapes().items()}
    described = {
        name: [{**asdict(c), "programs_per_sm": c.programs_per_sm} for c in done]
        for name, done in compiled.items()
    }
    sys.stdout.write(json.dumps(described))


if __name__ == "__main__":
    main()
