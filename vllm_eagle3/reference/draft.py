"""The EAGLE-3 draft decoder in plain PyTorch. The trainer trains it, and the reference decoder drafts with it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_eagle3.checkpoint import CheckpointError, read_checkpoint
from vllm_eagle3.reference.config import PlainDraftConfig
from vllm_eagle3.reference.rope import rope_frequencies

KV = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32, returned in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neox-style rotation of the first r features of x [n, heads, d] by cos, sin [n, r / 2], in fp32."""
    rotated = 2 * cos.shape[-1]
    a, b = x[..., :rotated].float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    return turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], dim=-1)


class DraftAttention(nn.Module):
    """Projections of the draft's attention; q, k, v read cat[norm(e), norm(g)] (2h features)."""

    def __init__(self, c: PlainDraftConfig) -> None:
        super().__init__()
        bias = c.attention_bias
        self.q_proj = nn.Linear(2 * c.hidden_size, c.num_attention_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(2 * c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(2 * c.hidden_size, c.num_key_value_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.head_dim = c.head_dim
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def query(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.q_norm(q) if self.q_norm is not None else q, cos, sin)

    def key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> KV:
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        k = rotate(self.k_norm(k) if self.k_norm is not None else k, cos, sin)
        return k, self.v_proj(x).unflatten(-1, (-1, self.head_dim))


class DraftMLP(nn.Module):
    def __init__(self, c: PlainDraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """x = attn(cat[e, hidden_norm(g)]) + g;  a = x + mlp(norm(x))."""

    def __init__(self, c: PlainDraftConfig) -> None:
        super().__init__()
        self.self_attn = DraftAttention(c)
        self.mlp = DraftMLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.norm_before_residual = c.norm_before_residual

    def inputs(self, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The input of attention [n, 2h] and the residual [n, h]."""
        normed = self.hidden_norm(g)
        return torch.cat(
            [self.input_layernorm(e), normed], dim=-1
        ), normed if self.norm_before_residual else g

    def output(self, attended: Tensor, residual: Tensor) -> Tensor:
        x = self.self_attn.o_proj(attended.flatten(-2)) + residual
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftModel(nn.Module):
    """One EAGLE-3 draft. `state_dict` names are the canonical tensor names (plus embed_tokens, d2t)."""

    d2t: Tensor
    inv_freq: Tensor
    fc_norm: nn.ModuleList | None
    input_norm: RMSNorm | None

    def __init__(self, config: PlainDraftConfig) -> None:
        super().__init__()
        c = self.config = config
        n_aux = len(c.aux_layers)
        self.fc = nn.Linear(n_aux * c.target_hidden_size, c.hidden_size, bias=False)
        self.fc_norm = (
            nn.ModuleList(RMSNorm(c.target_hidden_size, c.rms_norm_eps) for _ in range(n_aux))
            if c.fc_norm
            else None
        )
        self.input_norm = RMSNorm(n_aux * c.target_hidden_size, c.rms_norm_eps) if c.input_norm else None
        self.layers = nn.ModuleList([DraftLayer(c)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.draft_vocab_size, bias=False)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.embed_tokens.weight.requires_grad_(False)
        self.register_buffer("d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64))
        inv_freq, self.rope_scale = rope_frequencies(c.rope_parameters, c.head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @property
    def draft_layer(self) -> DraftLayer:
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [n, h] of target ids [n]."""
        return self.embed_tokens(ids)

    def fuse(self, states: list[Tensor]) -> Tensor:
        """g [n, h] from the target's low, mid and high states, each [n, ht]."""
        if self.fc_norm is not None:
            states = [norm(s) for norm, s in zip(self.fc_norm, states, strict=True)]
        x = torch.cat(list(states), dim=-1)
        return self.fc(self.input_norm(x) if self.input_norm is not None else x)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [n, rotated / 2] in fp32 of positions [n]."""
        angles = positions.float()[:, None] * self.inv_freq.float()
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def layer(
        self, e: Tensor, g: Tensor, positions: Tensor, kv: KV | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KV]:
        """One pass of the decoder layer over n rows that follow `past` cached rows.

        e: embeddings of the *next* token [n, h]; g: features (or the previous a) [n, h]; positions [n];
        kv: (k, v), each [past, kv_heads, head_dim], k rotated; mask: bool [n, past + n], True for the keys that a
        row reads (None: causal). Returns a [n, h] before the last norm, and the cache with the n new rows.
        """
        layer = self.draft_layer
        x, residual = layer.inputs(e, g)
        cos, sin = self.rotary(positions)
        q = layer.self_attn.query(x, cos, sin)
        k, v = layer.self_attn.key_value(x, cos, sin)
        if kv is not None:
            k, v = torch.cat([kv[0], k]), torch.cat([kv[1], v])
        n, total = q.shape[0], k.shape[0]
        if mask is None:
            mask = torch.ones(n, total, dtype=torch.bool, device=q.device).tril(total - n)
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            enable_gqa=True,
        )[0].transpose(0, 1)
        return layer.output(attended, residual), (k, v)

    def next_g(self, a: Tensor) -> Tensor:
        """The input of the next draft step in place of g: a, or norm(a) if the config has norm_output."""
        return self.norm(a) if self.config.norm_output else a

    def logits(self, a: Tensor) -> Tensor:
        """Logits [n, draft_vocab] of a [n, h]."""
        return self.lm_head(self.norm(a))

    def draft_to_target(self, ids: Tensor) -> Tensor:
        """Target ids of draft ids: id + d2t[id]."""
        return ids + self.d2t[ids]

    @property
    def target_ids(self) -> Tensor:
        """The target id of every draft id, [draft_vocab]."""
        return torch.arange(self.config.draft_vocab_size, device=self.d2t.device) + self.d2t


def load_draft(
    path: str | Path,
    *,
    target: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    embeddings: Tensor | None = None,
    head: Tensor | None = None,
) -> DraftModel:
    """Load the draft in the directory `path`, in any dialect that `vllm_eagle3.checkpoint` reads.

    target: directory of the target. Its config is checked against the draft's, and gives the aux layers if the
    draft's own config names none.
    embeddings, head [vocab, h]: the target's, for a checkpoint that contains none. Without `embeddings`,
    `embed_tokens` of such a draft is filled with NaN, and the caller must set it before use.

    Raises:
        CheckpointError: `vllm_eagle3.checkpoint` refuses the draft, neither it nor the caller has a head, or it has
            tensors that the plain model does not use.
    """
    checkpoint = read_checkpoint(path, target)
    model = DraftModel(PlainDraftConfig.resolved(checkpoint.config, str(path)))
    tensors = dict(checkpoint.tensors())
    tensors.pop("t2d", None)
    offsets = tensors.setdefault("d2t", model.d2t)
    if embeddings is None:
        embeddings = torch.full(model.embed_tokens.weight.shape, torch.nan)
    tensors.setdefault("embed_tokens.weight", embeddings)
    if "lm_head.weight" not in tensors:
        if head is None:
            raise CheckpointError(f"{path}: expected lm_head.weight or the target's head, found neither")
        ids = torch.arange(len(offsets)) + offsets
        tensors["lm_head.weight"] = head[ids.to(head.device)]
    unknown = tensors.keys() - model.state_dict().keys()
    if unknown:
        raise CheckpointError(f"{path}: the plain draft model does not use {sorted(unknown)}")
    model.load_state_dict(tensors)
    return model.to(dtype).eval()
