"""The target: its low, mid and high states and the last normed state, online in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_eagle3.checkpoint import default_aux_layers
from vllm_eagle3.training.data import Batch


@dataclass(frozen=True)
class Features:
    """What training reads of the target for a packed batch of T tokens.

    aux: the chosen states, each [T, ht]; last: the normed state the target's head reads, [T, ht].
    """

    aux: list[Tensor]
    last: Tensor


class Target:
    """The frozen target model, by transformers."""

    def __init__(
        self,
        path: str | Path,
        aux_layers: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises ValueError when the model has not the layers that `aux_layers` names."""
        self.path = str(path)
        self.config: Any = AutoConfig.from_pretrained(path).get_text_config()
        n = self.config.num_hidden_layers
        if aux_layers is None and n < 7:
            raise ValueError(
                f"aux_layers: the default (2, n // 2, n - 3) needs a target with at least 7 layers, "
                f"found {n}; name the layers to read with --aux-layers"
            )
        self.aux_layers = default_aux_layers(n) if aux_layers is None else tuple(aux_layers)
        if any(not 0 <= k <= n for k in self.aux_layers):
            raise ValueError(
                f"aux_layers: expected ids in 0..{n} (layers of {path}), found {self.aux_layers}"
            )
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.model = model = model.to(device).eval().requires_grad_(False)
        self.decoder: Any = model.get_decoder()
        self.head: Tensor = model.get_output_embeddings().weight
        self.embeddings: Tensor = model.get_input_embeddings().weight
        self.device = torch.device(device)
        self._seen: dict[int, Tensor] = {}
        for k in self.aux_layers:
            module: nn.Module = self.decoder.embed_tokens if k == 0 else self.decoder.layers[k - 1]
            module.register_forward_hook(self._keep(k))

    def _keep(self, k: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[k] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def features(self, batch: Batch) -> Features:
        """Features of a packed batch; documents do not see one another."""
        width = int(batch.lengths.max())
        real = torch.arange(width, device=batch.lengths.device)[None] < batch.lengths[:, None]
        ids = torch.zeros_like(real, dtype=torch.int64)
        ids[real] = batch.tokens
        # Padding is on the right, so causal attention alone keeps it away from real tokens.
        last = self.decoder(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return Features([self._seen[k][real] for k in self.aux_layers], last[real])
