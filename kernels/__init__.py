"""Triton kernels of the draft step, each with a plain-torch twin. No vLLM import in here.

Public functions choose by the device of their tensors: Triton on CUDA, plain torch on a CPU. The argument
backend="triton" or "torch" overrides the choice. The torch paths do not need Triton.
"""

from ._triton import HAS_TRITON
from .commit_kv import KVTable, commit_kv, kv_table
from .concat_fc import concat_fc
from .head_shards import sharded_topk
from .head_topk import HeadTopK, head_topk
from .linear_fp8 import MOST_ROWS, linear_fp8, quant_fp8
from .path_attention import path_attention
from .skinny_gemm import ROWS_OF_EACH_TILE
from .topk import MOST_LOGITS, UNLIKELY, finite, top_children, top_k
from .tree_attention import node_attention, tree_attention
from .tree_growth import TreeGrowth
from .tree_steps import MAX_NODES, ancestor_bits, tree_walk

__all__ = [
    "HAS_TRITON",
    "MAX_NODES",
    "MOST_LOGITS",
    "MOST_ROWS",
    "ROWS_OF_EACH_TILE",
    "UNLIKELY",
    "HeadTopK",
    "KVTable",
    "TreeGrowth",
    "ancestor_bits",
    "commit_kv",
    "concat_fc",
    "finite",
    "head_topk",
    "kv_table",
    "linear_fp8",
    "node_attention",
    "path_attention",
    "quant_fp8",
    "sharded_topk",
    "top_children",
    "top_k",
    "tree_attention",
    "tree_walk",
]
