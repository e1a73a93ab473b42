"""Triton kernels of the draft step, each with a plain-torch twin. No vLLM import in here.

Public functions choose by the device of their tensors: Triton on CUDA, plain torch on a CPU. The argument
backend="triton" or "torch" overrides the choice. The torch paths do not need Triton.
"""

from ._triton import HAS_TRITON
from .commit_kv import KVTable, commit_kv, kv_table
from .concat_fc import concat_fc
from .head_topk import HeadTopK, head_topk, local_topk, merge_topk
from .linear_fp8 import linear_fp8, quant_fp8
from .path_attention import path_attention
from .topk import MOST_LOGITS, UNLIKELY, finite, top_children, top_k
from .tree_attention import node_attention, tree_attention
from .tree_steps import MAX_NODES, ancestor_bits, tree_walk

__all__ = [
    "HAS_TRITON",
    "MAX_NODES",
    "MOST_LOGITS",
    "UNLIKELY",
    "HeadTopK",
    "KVTable",
    "ancestor_bits",
    "commit_kv",
    "concat_fc",
    "finite",
    "head_topk",
    "kv_table",
    "linear_fp8",
    "local_topk",
    "merge_topk",
    "node_attention",
    "path_attention",
    "quant_fp8",
    "top_children",
    "top_k",
    "tree_attention",
    "tree_walk",
]
