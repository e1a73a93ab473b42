"""C++ kernels for CPUs, compiled on first use, each with a plain-torch twin. No vLLM import in here.

The argument backend is "native", "torch", or None for the compiled kernel if there is one. Tensors are on the CPU.
"""

from .build import native
from .call import choose_backend
from .commit_kv import KVTable, commit_kv, kv_table
from .growth import Growth, Level, top_children
from .layout import KVLayout, observed
from .path_attention import path_attention
from .tree_attention import tree_attention

__all__ = [
    "Growth",
    "KVLayout",
    "KVTable",
    "Level",
    "choose_backend",
    "commit_kv",
    "kv_table",
    "native",
    "observed",
    "path_attention",
    "top_children",
    "tree_attention",
]
