"""Tests of Model Runner V2. Without a GPU: `VLLM_EAGLE3_INTERPRET=1 pytest tests/v2`, in a process of its
own.

vLLM settles once, at import, whether Triton is usable; so V1 and interpreted V2 engines cannot share a
process.
"""

import torch

from vllm_eagle3.runner import interpreter

if not (interpreter.enabled() or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]
