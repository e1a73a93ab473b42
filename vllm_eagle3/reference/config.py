"""Shapes and conventions of a draft for the plain PyTorch model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_eagle3.checkpoint import CheckpointError, DraftConfig


@dataclass(frozen=True)
class PlainDraftConfig:
    """Shapes and conventions of one draft; names are those of `config.json` where one exists."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    target_hidden_size: int
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    qk_norm: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    fc_norm: bool = False
    input_norm: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size: expected 1..{self.vocab_size} (vocab_size), found {self.draft_vocab_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if not self.aux_layers:
            raise ValueError("aux_layers is empty: at least one layer of the target has to be read")

    @classmethod
    def resolved(cls, found: DraftConfig, source: str) -> PlainDraftConfig:
        """The plain form of a config that `vllm_eagle3.checkpoint` resolved.

        Raises:
            CheckpointError: only vLLM's own EAGLE-3 serves this draft, or its aux layers are unknown.
        """
        if found.unsupported_reason or found.aux_layers is None:
            raise CheckpointError(f"{source}: {found.unsupported_reason or 'its aux layers are not known'}")
        layer = found.layer_config
        same = ["intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
        same += ["rms_norm_eps", "rope_parameters", "attention_bias"]
        return cls(
            hidden_size=found.hidden_size,
            vocab_size=found.vocab_size,
            draft_vocab_size=found.draft_vocab_size,
            aux_layers=tuple(found.aux_layers),
            target_hidden_size=found.target_hidden_size,
            max_position_embeddings=found.max_position_embeddings,
            qk_norm=layer["model_type"] == "qwen3",
            norm_before_residual=found.norm_before_residual,
            norm_output=found.norm_output,
            fc_norm=found.fc_norm,
            input_norm=found.norm_before_fc,
            **{name: layer[name] for name in same},
        )

    @property
    def rope_theta(self) -> float:
        return float(self.rope_parameters["rope_theta"])
