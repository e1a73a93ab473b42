"""A fresh draft for a target: its shapes, its draft vocabulary and the weights it starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_eagle3.training.data import Batch
from vllm_eagle3.training.features import Features, Target
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


START_RMS = 8.0  # of g, where fc_norm sets its scale


@torch.no_grad()
def new_draft(target: Target, vocabulary: Tensor, options: dict[str, Any], init: str, seed: int, sample: Batch) -> DraftModel:
    """A draft with the target's embeddings, and its rows of the head and last norm.

    vocabulary: sorted target ids [draft_vocab]; sample: some training documents, from which the scales of the
    target's states are measured. init "random": normal(0, 0.02) elsewhere; "regression": fc starts as the
    ridge regression from the fused states to the target's next state, and the layer as the identity;
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
    features = target.features(sample)
    if model.fc_norm is not None:
        for norm, state in zip(model.fc_norm, features.aux, strict=True):
            norm.weight.copy_(1 / channel_rms(state))
    e = model.embed(sample.tokens)
    model.draft_layer.input_layernorm.weight.copy_(1 / channel_rms(e))
    if init == "regression":
        start_from_regression(model, features, sample)
    elif init == "target":
        start_from_last_layer(model, target, features)
    elif init != "random":
        raise ValueError(f"init must be random or target, found {init!r}")
    return model


def channel_rms(x: Tensor) -> Tensor:
    """Root mean square of each channel of x [n, d] after every row was divided by its own."""
    x = x.float()
    x = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    return x.pow(2).mean(0).sqrt().clamp(min=1e-3)


def start_from_regression(model: DraftModel, features: Features, sample: Batch) -> None:
    states = [norm(s.float()) for norm, s in zip(model.fc_norm, features.aux, strict=True)]
    x = torch.cat(states, dim=-1)[:-1].double()
    y = (features.last[1:].float() / model.norm.weight).double()
    keep = sample.mask[1:]
    x, y = x[keep], y[keep]
    gram = x.T @ x + 0.1 * len(x) * torch.eye(x.shape[1], dtype=torch.double)
    w = torch.linalg.solve(gram, x.T @ y)
    print("r2", 1 - ((y - x @ w) ** 2).sum() / (y**2).sum())
    model.fc.weight.copy_(w.T)
    model.draft_layer.self_attn.o_proj.weight.mul_(0.5)
    model.draft_layer.mlp.down_proj.weight.mul_(0.5)


def start_from_last_layer(model: DraftModel, target: Target, features: Features) -> None:
    """Copy the target's last layer into the half that reads g; fc starts by passing the last aux state on."""
    h = model.config.hidden_size
    source, layer = target.decoder.layers[-1], model.draft_layer
    gain = 1.0
    high = torch.ones(h)
    if model.fc_norm is not None:
        gain = START_RMS / float(features.aux[-1].float().pow(2).mean(-1).sqrt().median())
        high = START_RMS / model.fc_norm[-1].weight
    model.fc.weight.zero_()
    model.fc.weight[:, -h:] = torch.diag(high)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer.self_attn, name).weight.zero_()
        getattr(layer.self_attn, name).weight[:, h:] = getattr(source.self_attn, name).weight
    layer.self_attn.o_proj.weight.copy_(source.self_attn.o_proj.weight * gain)
    for name in ("gate_proj", "up_proj"):
        getattr(layer.mlp, name).weight.copy_(getattr(source.mlp, name).weight)
    layer.mlp.down_proj.weight.copy_(source.mlp.down_proj.weight * gain)
    layer.hidden_norm.weight.copy_(source.input_layernorm.weight)
    layer.post_attention_layernorm.weight.copy_(source.post_attention_layernorm.weight)
