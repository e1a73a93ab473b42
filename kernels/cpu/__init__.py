"""Native CPU kernels, compiled on first use, each with a plain-torch twin. No vLLM import in here.

backend="native" or "torch" picks; None takes the compiled kernel where there is one. Tensors are on the CPU.
"""

from .build import native
from .call import choose_backend
from .commit_kv import KVTable, commit_kv, kv_table
from .layout import KVLayout, observed
from .path_attention import path_attention
from .tree_attention import tree_attention

__all__ = [
    "KVLayout", "KVTable", "choose_backend", "commit_kv", "kv_table", "native", "observed", "path_attention",
    "tree_attention",
]  # fmt: skip
