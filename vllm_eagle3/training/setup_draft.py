"""A fresh draft for a target: its shapes, its draft vocabulary and the weights it starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_eagle3.training.features import Target
from vllm_eagle3.training.model import DraftConfig, DraftModel


def draft_config(target: Target, draft_vocab_size: int, options: dict[str, Any]) -> DraftConfig:
    """Shapes of the target's own decoder layers; `options` are further fields of DraftConfig."""
    c = target.config
    heads = c.num_attention_heads
    rope = dict(getattr(c, "rope_parameters", None) or {"rope_type": "default", "rope_theta": c.rope_theta})
    return DraftConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(c, "num_key_value_heads", None) or heads,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
        vocab_size=len(target.embeddings),
        draft_vocab_size=draft_vocab_size,
        aux_layers=target.aux_layers,
        target_hidden_size=c.hidden_size,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=rope,
        max_position_embeddings=c.max_position_embeddings,
        **options,
    )


@torch.no_grad()
def new_draft(target: Target, vocabulary: Tensor, options: dict[str, Any], init: str, seed: int) -> DraftModel:
    """A draft with the target's embeddings, and its rows of the head and last norm.

    vocabulary: sorted target ids [draft_vocab]. init "random": normal(0, 0.02) elsewhere; "target": the layer starts
    as the target's last one, reading the high state (where shapes and names allow: Llama-like layers).
    """
    torch.manual_seed(seed)
    model = DraftModel(draft_config(target, len(vocabulary), options))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("embed_tokens"):
            parameter.normal_(0.0, 0.02)
        elif name.endswith("bias"):
            parameter.zero_()
    model.embed_tokens.weight.data = target.embeddings.detach().clone().cpu()
    model.lm_head.weight.copy_(target.head[vocabulary.to(target.head.device)])
    model.norm.weight.copy_(target.decoder.norm.weight)
    model.d2t.copy_(vocabulary - torch.arange(len(vocabulary)))
    if init == "target":
        start_from_last_layer(model, target)
    elif init != "random":
        raise ValueError(f"init must be random or target, found {init!r}")
    return model


def start_from_last_layer(model: DraftModel, target: Target) -> None:
    """Copy the target's last layer into the half that reads g; fc starts by passing the last aux state on."""
    h = model.config.hidden_size
    model.fc.weight[:, -h:] += torch.eye(h)
    source, layer = target.decoder.layers[-1], model.draft_layer
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer.self_attn, name).weight[:, h:] = getattr(source.self_attn, name).weight
    layer.self_attn.o_proj.weight.copy_(source.self_attn.o_proj.weight)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(layer.mlp, name).weight.copy_(getattr(source.mlp, name).weight)
    layer.hidden_norm.weight.copy_(source.input_layernorm.weight)
    layer.post_attention_layernorm.weight.copy_(source.post_attention_layernorm.weight)
