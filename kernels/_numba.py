"""Compiles loops for a CPU with Numba, which vLLM requires. The machine code is cached on disk."""

from typing import Any

from numba import carray, njit, types
from numba.extending import intrinsic

jit = njit(cache=True, nogil=True)
"""Compiles a function at its first call for the types it is called with, and keeps the machine code on disk."""


@intrinsic
def _int32_pointer(typingctx: Any, address: Any) -> Any:
    """A pointer to int32 from an address (uint64)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int32)(types.uint64), codegen


@jit
def int32_array(address, length):
    """The int32 array [length] that begins at an address (uint64)."""
    return carray(_int32_pointer(address), (length,))
