"""Shapes of real models, to measure the throughput of large models with random weights and synthetic acceptance."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int
) -> dict[str, Any]:
    return _LLAMA | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
    }


# name: (target's configuration, the draft's vocabulary). The draft is one layer of the target's width.
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "llama-3.1-8b": (_llama(4096, 32, 32, 8, 14336, 128256), 32000),
    "llama-3.1-70b": (_llama(8192, 80, 64, 8, 28672, 128256), 32000),
    "tiny": (_llama(128, 8, 4, 2, 256, 512), 512),  # for dry runs
}


def write_shape(name: str, folder: Path, positions: int = 0) -> tuple[Path, Path]:
    """Write directories of target and draft with a config.json but no weights, for vLLM's `load_format="dummy"`.

    positions: the longest sequence in tokens, if it must be longer than the shape's own.
    """
    target, draft_vocab = SHAPES[name]
    target = target | {"max_position_embeddings": max(target["max_position_embeddings"], positions)}
    layers = target["num_hidden_layers"]
    draft = target | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": draft_vocab,
        "eagle_aux_hidden_state_layer_ids": [2, layers // 2, layers - 3],
    }
    paths = folder / "target", folder / "draft"
    for path, config in zip(paths, (target, draft), strict=True):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return paths


def pseudo_tokens(text: str, vocab: int) -> list[int]:
    """Token ids for a model without a tokenizer: one token for every four characters of a real prompt."""
    pieces = (text[i : i + 4] for i in range(0, len(text), 4))
    return [2 + zlib.crc32(piece.encode()) % (vocab - 2) for piece in pieces]
