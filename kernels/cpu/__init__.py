"""Native CPU kernels, compiled on first use, each with a plain-torch twin. No vLLM import in here.

backend="native" or "torch" picks; None takes the compiled kernel where there is one. Tensors are on the CPU.
"""

from .build import native
from .call import choose_backend
from .layout import KVLayout, observed
from .path_attention import path_attention
from .tree_attention import tree_attention

__all__ = ["KVLayout", "choose_backend", "native", "observed", "path_attention", "tree_attention"]
