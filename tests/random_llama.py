"""Targets with random weights whose text depends on attention, and random or broken EAGLE-3 drafts for them."""

from pathlib import Path
from typing import Any

import torch
from llama_files import llama_config, save_checkpoint

HIDDEN, HEAD_DIM, HEADS, KV_HEADS, INTERMEDIATE, LAYERS = 128, 32, 4, 2, 256, 4


def _config(vocab: int, **extra: Any) -> dict[str, Any]:
    return llama_config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=vocab,
        torch_dtype="float32",
        **extra,
    )


def _matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns) * gain / columns**0.5


def _layer(prefix: str, inputs: int) -> dict[str, torch.Tensor]:
    return {
        prefix + "self_attn.q_proj.weight": _matrix(HEADS * HEAD_DIM, inputs, 1.5),
        prefix + "self_attn.k_proj.weight": _matrix(KV_HEADS * HEAD_DIM, inputs, 1.5),
        prefix + "self_attn.v_proj.weight": _matrix(KV_HEADS * HEAD_DIM, inputs),
        prefix + "self_attn.o_proj.weight": _matrix(HIDDEN, HEADS * HEAD_DIM, 2.0),
        prefix + "mlp.gate_proj.weight": _matrix(INTERMEDIATE, HIDDEN),
        prefix + "mlp.up_proj.weight": _matrix(INTERMEDIATE, HIDDEN),
        prefix + "mlp.down_proj.weight": _matrix(HIDDEN, INTERMEDIATE),
        prefix + "input_layernorm.weight": torch.ones(HIDDEN),
        prefix + "post_attention_layernorm.weight": torch.ones(HIDDEN),
    }


def write_target(folder: Path, vocab: int = 512, seed: int = 0, gain: float = 3.0) -> Path:
    """Random target in float32; `gain` scales its logits."""
    torch.manual_seed(seed)
    weights = {
        "model.embed_tokens.weight": torch.randn(vocab, HIDDEN) * 0.5,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": _matrix(vocab, HIDDEN, gain),
    }
    for layer in range(LAYERS):
        weights |= _layer(f"model.layers.{layer}.", HIDDEN)
    config = _config(vocab, architectures=["LlamaForCausalLM"], num_hidden_layers=LAYERS)
    return save_checkpoint(folder, config, weights)


def write_draft(folder: Path, vocab: int = 512, seed: int = 1) -> Path:
    """Random draft."""
    torch.manual_seed(seed)
    weights = {
        "fc.weight": _matrix(HIDDEN, 3 * HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": _matrix(vocab, HIDDEN, 3.0),
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
    } | _layer("midlayer.", 2 * HIDDEN)
    config = _config(
        vocab,
        architectures=["LlamaForCausalLMEagle3"],
        num_hidden_layers=1,
        draft_vocab_size=vocab,
        eagle_aux_hidden_state_layer_ids=[1, 2, 4],
    )
    return save_checkpoint(folder, config, weights)
