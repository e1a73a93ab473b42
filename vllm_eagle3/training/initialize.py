"""Makes a new draft for a target: its shapes, its vocabulary and its first weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_eagle3.reference.config import PlainDraftConfig
from vllm_eagle3.reference.draft import DraftModel, RMSNorm, load_draft
from vllm_eagle3.training.data import Batch, draft_vocabulary
from vllm_eagle3.training.features import Features, Target, head_dim, target_rope
from vllm_eagle3.training.settings import INITS


def draft_config(target: Target, draft_vocab_size: int, options: dict[str, Any]) -> PlainDraftConfig:
    """A draft with the shapes and the style of the target's decoder layers (Llama, or Qwen3 with norms on q and k).

    `options` are further fields of PlainDraftConfig.
    """
    c = target.config
    heads = c.num_attention_heads
    return PlainDraftConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(c, "num_key_value_heads", None) or heads,
        head_dim=head_dim(c),
        vocab_size=len(target.embeddings),
        draft_vocab_size=draft_vocab_size,
        aux_layers=target.aux_layers,
        target_hidden_size=c.hidden_size,
        rms_norm_eps=getattr(c, "rms_norm_eps", 1e-6),
        rope_parameters=target_rope(c),
        max_position_embeddings=c.max_position_embeddings,
        **{"qk_norm": hasattr(target.decoder.layers[-1].self_attn, "q_norm")} | options,
    )


START_RMS = 8.0  # first rms of g if fc_norm decides its scale


@torch.no_grad()
def new_draft(
    target: Target, vocabulary: Tensor, options: dict[str, Any], init: str, seed: int, sample: Batch
) -> DraftModel:
    """A draft with the target's embeddings, its last norm, and the rows of its head that the vocabulary selects.

    vocabulary: sorted target ids [draft_vocab]. sample: some training documents, on which the scale of each channel
    of the target's states is measured. Some channels are a thousand times larger than others, but Adam takes steps of
    the same size for all. Therefore the norms before a projection start with the inverse of each channel's rms.
    init "random": the layer starts as normal(0, 0.02); "target": it starts as a copy of the target's last layer that
    reads the last aux state. Raises ValueError if that layer has other shapes.
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
    model.lm_head.weight.copy_(target.head.of(vocabulary).weight)
    model.norm.weight.copy_(norm_gain(target.decoder.norm, model.norm.weight))
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


@torch.no_grad()
def warm_start(path: str | Path, target: Target, counts: np.ndarray, size: int | None) -> DraftModel:
    """The draft in the directory `path`, with more tokens up to a vocabulary of `size` (None: unchanged).

    The most frequent tokens that it lacks are added, with the target's rows of the head; its own rows are kept.
    counts [vocab]: how often each target id occurs in the training answers. Raises ValueError for a draft of another
    target, or if `size` is smaller than the draft's vocabulary.
    """
    old = load_draft(path, embeddings=target.embeddings.float().cpu())
    c = old.config
    if c.aux_layers != target.aux_layers or c.vocab_size != len(target.embeddings):
        raise ValueError(
            f"{path}: made for layers {c.aux_layers} and {c.vocab_size} tokens; this run has layers "
            f"{target.aux_layers} and {len(target.embeddings)} tokens"
        )
    if size is None or size == c.draft_vocab_size:
        return old.train()
    if not c.draft_vocab_size < size <= c.vocab_size:
        expected = f"{c.draft_vocab_size} (what {path} has) to {c.vocab_size}"
        raise ValueError(f"draft_vocab_size: expected {expected}, found {size}")
    kept = old.target_ids
    rank = counts.astype(np.int64).copy()
    rank[kept.numpy()] = np.iinfo(np.int64).max
    vocabulary = draft_vocabulary(rank, size)
    model = DraftModel(replace(c, draft_vocab_size=size))
    tensors = {k: v for k, v in old.state_dict().items() if k not in ("lm_head.weight", "d2t")}
    model.load_state_dict(tensors, strict=False)
    model.lm_head.weight.copy_(target.head.of(vocabulary).weight)
    model.lm_head.weight[torch.isin(vocabulary, kept)] = old.lm_head.weight
    model.d2t.copy_(vocabulary - torch.arange(size))
    return model


def channel_rms(x: Tensor) -> Tensor:
    """Root mean square of each channel of x [n, d], after each row was divided by its own root mean square."""
    x = x.float()
    x = x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    return x.pow(2).mean(0).sqrt().clamp(min=1e-3)


def norm_gain(norm: Any, like: Tensor) -> Tensor:
    """The factor of each channel in a norm of the target, [h]: its weight, or 1 + weight as in Gemma."""
    ones = torch.ones_like(norm.weight)
    flipped = ones.clone()
    flipped[1::2] = -1  # mean 0, so that a LayerNorm does not change it either
    return (norm(flipped[None])[0] / flipped).to(like)


def start_from_last_layer(model: DraftModel, target: Target, features: Features) -> None:
    """Copy the target's last layer into the half of the draft that reads g. fc starts as the last aux state alone.

    With fc_norm or input_norm, g starts with rms START_RMS, and the layer's outputs are scaled to match.
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
        if "norm.weight" in name and "self_attn" not in name:
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
    # In Gemma, post_attention_layernorm norms the output of attention, and the norm before the MLP has another name.
    before_mlp = getattr(source, "pre_feedforward_layernorm", None) or source.post_attention_layernorm
    layer.hidden_norm.weight.copy_(norm_gain(source.input_layernorm, layer.hidden_norm.weight))
    layer.post_attention_layernorm.weight.copy_(norm_gain(before_mlp, layer.post_attention_layernorm.weight))
