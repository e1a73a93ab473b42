"""Reads EAGLE-3 checkpoints of four dialects into one canonical form. Needs neither vLLM nor a GPU."""

from vllm_eagle3.checkpoint.aux_layers import default_aux_layers
from vllm_eagle3.checkpoint.cli import add_parser, inspect
from vllm_eagle3.checkpoint.config import DraftConfig, resolve_config
from vllm_eagle3.checkpoint.errors import CheckpointError
from vllm_eagle3.checkpoint.files import Checkpoint, check_draft, read_checkpoint, refuse_unreadable
from vllm_eagle3.checkpoint.tensors import canonical_tensors
from vllm_eagle3.checkpoint.vocab_map import resolve_vocab_map

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DraftConfig",
    "add_parser",
    "canonical_tensors",
    "check_draft",
    "default_aux_layers",
    "inspect",
    "read_checkpoint",
    "refuse_unreadable",
    "resolve_config",
    "resolve_vocab_map",
]
