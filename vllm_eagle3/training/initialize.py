"""A fresh draft for a target: its shapes, its draft vocabulary and the weights it starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_eagle3.reference.draft import DraftModel, PlainDraftConfig, RMSNorm
from vllm_eagle3.training.data import Batch
from vllm_eagle3.training.features import Features, Target


def draft_config(target: Target, draft_vocab_size: int, options: dict[str, Any]) -> PlainDraftConfig:
    """Shapes and style (Llama, or Qwen3 with norms on q and k) of the target's own decoder layers.

    `options` are further fields of PlainDraftConfig.
    """
    c = target.config
    heads = c.num_attention_heads
    rope = dict(getattr(c, "rope_parameters", None) or {"rope_type": "default", "rope_theta": c.rope_theta})
    return PlainDraftConfig(
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
        **{"qk_norm": hasattr(target.decoder.layers[-1].self_attn, "q_norm")} | options,
    )


START_RMS = 8.0  # of g, where fc_norm sets its scale
INITS = ("target", "random")


@torch.no_grad()
def new_draft(
    target: Target, vocabulary: Tensor, options: dict[str, Any], init: str, seed: int, sample: Batch
) -> DraftModel:
    """A draft with the target's embeddings, and its rows of the head and its last norm.

    vocabulary: sorted target ids [draft_vocab]. sample: some training documents, from which the scales of the
    target's states are measured: those of some channels are a thousand times those of others, and Adam steps
    alike on all, so norms before a projection start as the inverse of each channel's rms.
    init "random": the layer starts as normal(0, 0.02); "target": as the target's last layer, reading the
    last aux state. Raises ValueError where that layer has other shapes.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, found {init!r}")
    torch.manual_seed(seed)
    model = DraftModel(draft_config(target, len(vocabulary), options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() > 1 and name != "embed_tokens.weight":
            parameter.normal_(0.0, 0.02)
    model.embed_tokens.weight.data = target.embeddings.detach().clone().cpu()
    model.lm_head.weight.copy_(target.head[vocabulary.to(target.head.device)])
    model.norm.weight.copy_(target.decoder.norm.weight)
    model.d2t.copy_(vocabulary - torch.arange(len(vocabulary)))
    features = target.features(sample)
    if model.fc_norm is not None:
        for norm, state in zip(model.fc_norm, features.aux, strict=True):
            assert isinstance(norm, RMSNorm)
            norm.weight.copy_(1 / channel_rms(state))
    if model.input_norm is not None:
        model.input_norm.weight.copy_(1 / channel_rms(torch.cat(features.aux, dim=-1)))
    model.draft_layer.input_layernorm.weight.copy_(1 / channel_rms(model.embed(sample.tokens.cpu())))
    if init == "target":
        start_from_last_layer(model, target, features)
    return model


def channel_rms(x: Tensor) -> Tensor:
    """Root mean square of each channel of x [n, d] after every row was divided by its own."""
    x = x.float()
    x = x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    return x.pow(2).mean(0).sqrt().clamp(min=1e-3)


def start_from_last_layer(model: DraftModel, target: Target, features: Features) -> None:
    """Copy the target's last layer into the half that reads g; fc starts by passing the last aux state on.

    With fc_norm or input_norm, g starts with rms START_RMS, and what the layer adds to it is scaled likewise.
    """
    h = model.config.hidden_size
    source, layer = target.decoder.layers[-1], model.draft_layer
    gain, high = 1.0, torch.ones(h)
    norms = [model.input_norm] if model.input_norm is not None else [*(model.fc_norm or [])]
    if norms:
        gain = START_RMS / float(features.aux[-1].float().pow(2).mean(-1).sqrt().median())
        high = START_RMS / norms[-1].weight[-h:]
    model.fc.weight.zero_()
    model.fc.weight[:, -h:] = torch.diag(high)
    scales = {"self_attn.o_proj.weight": gain, "mlp.down_proj.weight": gain}
    theirs = dict(source.named_parameters())
    for name, mine in layer.named_parameters():
        if name in ("input_layernorm.weight", "hidden_norm.weight"):
            continue
        start = theirs.get(name)
        reads_both = name.split(".")[1][:1] in "qkv" and mine.dim() == 2 and name.startswith("self_attn")
        half = mine[:, h:] if reads_both else mine
        if start is None or start.shape != half.shape:
            found = "nothing of that name" if start is None else tuple(start.shape)
            raise ValueError(
                f"init target: {name} should start from a {tuple(half.shape)} tensor of the target's last "
                f"layer, found {found}; use init random for this target"
            )
        mine.zero_()
        half.copy_(start * scales.get(name, 1.0))
    layer.hidden_norm.weight.copy_(source.input_layernorm.weight)
