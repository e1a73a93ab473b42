"""Runs the target in this process, for its low, mid and high states and its last normed state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_eagle3.checkpoint import default_aux_layers
from vllm_eagle3.checkpoint.rope import resolve_rope
from vllm_eagle3.reference.rope import rope_frequencies
from vllm_eagle3.training.data import Batch


@dataclass(frozen=True)
class Features:
    """The target's states that training reads, for a packed batch of T tokens.

    aux: the chosen states, each [T, ht]; last: the normed state the target's head reads, [T, ht].
    """

    aux: list[Tensor]
    last: Tensor


@dataclass(frozen=True)
class TargetHead:
    """The target's head: softcap * tanh(scale * states @ weight.T / softcap), without a soft cap where it is None.

    weight [vocab, ht]. Cohere's models scale their logits, Granite's divide them, Gemma 2 caps them.
    """

    weight: Tensor
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """fp32 logits [n, vocab] of normed states [n, ht]."""
        logits = (states @ self.weight.T).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def of(self, ids: Tensor) -> TargetHead:
        """The rows of the tokens `ids`."""
        return replace(self, weight=self.weight[ids.to(self.weight.device)])


def target_rope(config: Any) -> dict[str, Any]:
    """`rope_parameters` of the target's layers with full attention, which the draft's layer copies."""
    found = {k: getattr(config, k, None) for k in ("rope_parameters", "rope_theta", "rope_scaling")}
    found["partial_rotary_factor"] = getattr(config, "partial_rotary_factor", None)
    rope = found["rope_parameters"] or {}
    if "full_attention" in rope:  # one dict for each kind of layer, as in Gemma 3
        found |= {"rope_parameters": rope["full_attention"], "rope_theta": None}
    return resolve_rope({k: v for k, v in found.items() if v is not None}, source="the target's config")[0]


def check_target(path: str | Path, aux_layers: tuple[int, ...] | None = None) -> Any:
    """Check from the config alone that a draft can be trained for this target, and return its text config.

    Raises ValueError, which names what is not supported: several modalities, an encoder, a rope type, or aux layers
    that the target does not have.
    """
    whole: Any = AutoConfig.from_pretrained(path)
    config = whole.get_text_config()
    for name in ("vision_config", "audio_config"):
        if getattr(whole, name, None) is not None:
            raise ValueError(f"{path}: has a {name}: drafts are trained only for targets that read text")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{path}: is an encoder-decoder model; expected a decoder")
    n = config.num_hidden_layers
    if aux_layers is None and n < 7:
        raise ValueError(
            f"aux_layers: the default (2, n // 2, n - 3) needs a target with at least 7 layers, "
            f"found {n}; name the layers to read with --aux-layers"
        )
    chosen = default_aux_layers(n) if aux_layers is None else aux_layers
    if any(not 0 <= k <= n for k in chosen):
        raise ValueError(f"aux_layers: expected ids in 0..{n} (layers of {path}), found {tuple(chosen)}")
    try:
        rope_frequencies(target_rope(config), head_dim(config))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: rotary embedding not supported: {error}") from error
    return config


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Target:
    """The frozen target model, by transformers."""

    def __init__(
        self,
        path: str | Path,
        aux_layers: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises ValueError for a target that training does not support; see `check_target` and `_check_head`."""
        self.path = str(path)
        self.config: Any = check_target(path, aux_layers)
        n = self.config.num_hidden_layers
        if aux_layers is None and n < 7:
            raise ValueError(
                f"aux_layers: the default (2, n // 2, n - 3) needs a target with at least 7 layers, "
                f"found {n}; name the layers to read with --aux-layers"
            )
        self.aux_layers = default_aux_layers(n) if aux_layers is None else tuple(aux_layers)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.model = model = model.to(device).eval().requires_grad_(False)
        self.decoder: Any = model.get_decoder()
        for name in ("layers", "norm"):
            if not hasattr(self.decoder, name):
                kind = type(self.decoder).__name__
                raise ValueError(f"{path}: {kind} has no `{name}`: expected a model with Llama's modules")
        scale = getattr(self.config, "logit_scale", None) or 1 / (
            getattr(self.config, "logits_scaling", None) or 1
        )
        softcap = getattr(self.config, "final_logit_softcapping", None)
        self.head = TargetHead(model.get_output_embeddings().weight, scale, softcap)
        self.embeddings: Tensor = model.get_input_embeddings().weight
        self.device = torch.device(device)
        self._seen: dict[int, Tensor] = {}
        for k in self.aux_layers:
            module: nn.Module = self.decoder.embed_tokens if k == 0 else self.decoder.layers[k - 1]
            module.register_forward_hook(self._keep(k))
        self._check_head()

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raise ValueError if the target's logits differ from what `head` computes from its last state."""
        ids = torch.arange(min(8, len(self.embeddings)), device=self.device)[None]
        want = self.model(input_ids=ids, use_cache=False).logits[0].float()
        last = self.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        got = self.head.logits(last)
        if not torch.allclose(got, want, rtol=0.05, atol=0.05 * float(want.abs().max())):
            raise ValueError(
                f"{self.path}: the target's logits are not its head times its last state (with logit_scale, "
                f"logits_scaling and final_logit_softcapping): off by {float((got - want).abs().max()):.3g}; "
                "a draft would be trained on wrong distributions"
            )

    def _keep(self, k: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[k] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def features(self, batch: Batch) -> Features:
        """Features of a packed batch. Documents do not read one another."""
        width = int(batch.lengths.max())
        real = torch.arange(width, device=batch.lengths.device)[None] < batch.lengths[:, None]
        ids = torch.zeros_like(real, dtype=torch.int64)
        ids[real] = batch.tokens
        # Padding is on the right, so that with causal attention no real token reads it.
        last = self.decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return Features([self._seen[k][real] for k in self.aux_layers], last[real])
