"""A draft of any supported dialect as the plain-PyTorch model that the reference decoder runs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vllm_eagle3.checkpoint.errors import CheckpointError
from vllm_eagle3.checkpoint.files import read_checkpoint
from vllm_eagle3.reference.draft import DraftConfig, DraftModel


def load_draft(
    path: str | Path, target: str | Path, dtype: torch.dtype, embeddings: Tensor, head: Tensor
) -> DraftModel:
    """The draft at `path` for the target in directory `target`.

    `embeddings` and `head` [vocab, h] are the target's, used where the checkpoint has none of its own.

    Raises:
        CheckpointError: what vllm_eagle3.checkpoint refuses, or tensors the plain model has no place for.
    """
    checkpoint = read_checkpoint(path, target)
    tensors = dict(checkpoint.tensors())
    found = checkpoint.config
    if found.aux_layers is None:
        raise CheckpointError(f"{path}: its aux layers are not known")
    body = found.body
    config = DraftConfig(
        hidden_size=found.hidden_size,
        intermediate_size=body["intermediate_size"],
        num_attention_heads=body["num_attention_heads"],
        num_key_value_heads=body["num_key_value_heads"],
        head_dim=body["head_dim"],
        vocab_size=found.vocab_size,
        draft_vocab_size=found.draft_vocab_size,
        aux_layers=tuple(found.aux_layers),
        target_hidden_size=found.target_hidden_size,
        rms_norm_eps=body["rms_norm_eps"],
        rope_parameters=body["rope_parameters"],
        max_position_embeddings=found.max_position_embeddings,
        attention_bias=body["attention_bias"],
        qk_norm=body["model_type"] == "qwen3",
        norm_before_residual=found.norm_before_residual,
        norm_output=found.norm_output,
        fc_norm=found.fc_norm,
        input_norm=found.norm_before_fc,
    )
    tensors.pop("t2d", None)
    offsets = tensors.setdefault("d2t", torch.zeros(found.draft_vocab_size, dtype=torch.int64))
    tensors.setdefault("embed_tokens.weight", embeddings)
    if "lm_head.weight" not in tensors:
        ids = torch.arange(found.draft_vocab_size) + offsets
        tensors["lm_head.weight"] = head[ids.to(head.device)]
    model = DraftModel(config)
    unknown = tensors.keys() - model.state_dict().keys()
    if unknown:
        raise CheckpointError(f"{path}: the reference decoder has no place for {sorted(unknown)}")
    model.load_state_dict(tensors)
    return model.to(dtype).eval()
