"""A target whose text is known in closed form, and EAGLE-3 drafts whose mistakes are known as well.

Target: after token t comes `(5 t + 7) mod 512`, with a logit gap of `scale`, whatever the prompt, the shape of the
batch, the dtype or the runner. Draft: it computes the same from its input token alone, for any prefix and temperature,
except at the tokens where it is made wrong.
"""

from pathlib import Path
from typing import Any

import torch
from llama_files import llama_config, save_checkpoint

VOCAB = 512
HIDDEN = VOCAB  # one-hot embeddings
HEAD_DIM = 64
LAYERS = 4
AUX_LAYERS = (1, 2, 4)
ROOT_H = HIDDEN**0.5  # rms norm of a one-hot vector is ROOT_H times that vector


def next_token(token: int) -> int:
    """The target's greedy continuation of any text that ends in `token`."""
    return (token * 5 + 7) % VOCAB


def greedy_text(last: int, length: int) -> list[int]:
    """`length` tokens after a prompt that ends in `last`."""
    text = []
    for _ in range(length):
        last = next_token(last)
        text.append(last)
    return text


def expected_accepted(last: int, budget: int, wrong_every: int) -> int:
    """Drafts accepted in a step that starts from token `last` with a chain of `budget` drafts."""
    for accepted, token in enumerate(greedy_text(last, budget)):
        if wrong_every and token % wrong_every == 0:
            return accepted
    return budget


def _successor_matrix() -> torch.Tensor:
    """P with P @ onehot(t) = onehot(next_token(t))."""
    tokens = torch.arange(VOCAB)
    matrix = torch.zeros(VOCAB, VOCAB)
    matrix[(tokens * 5 + 7) % VOCAB, tokens] = 1.0
    return matrix


def _config(heads: int, kv_heads: int, **extra: Any) -> dict[str, Any]:
    return llama_config(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        torch_dtype="bfloat16",
        **extra,
    )


def write_target(folder: Path, scale: float = 20.0) -> Path:
    """Write a target: attention and MLP add nothing, and the head maps token t to next_token(t).

    `scale` is the logit of the successor; all other logits are 0. With about 8, sampling also takes other tokens.
    """
    heads, kv_heads = 8, 2
    generator = torch.Generator().manual_seed(0)

    def noise(rows: int) -> torch.Tensor:
        return torch.randn(rows, HIDDEN, generator=generator) * 0.02

    weights = {
        "model.embed_tokens.weight": torch.eye(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": _successor_matrix() * (scale / ROOT_H),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(HIDDEN),
            prefix + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            prefix + "self_attn.q_proj.weight": noise(heads * HEAD_DIM),
            prefix + "self_attn.k_proj.weight": noise(kv_heads * HEAD_DIM),
            prefix + "self_attn.v_proj.weight": noise(kv_heads * HEAD_DIM),
            prefix + "self_attn.o_proj.weight": torch.zeros(HIDDEN, heads * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": torch.zeros(HIDDEN, HIDDEN),
            prefix + "mlp.up_proj.weight": torch.zeros(HIDDEN, HIDDEN),
            prefix + "mlp.down_proj.weight": torch.zeros(HIDDEN, HIDDEN),
        }
    config = _config(heads, kv_heads, architectures=["LlamaForCausalLM"], num_hidden_layers=LAYERS)
    return save_checkpoint(folder, config, weights)


def write_draft(folder: Path, wrong_every: int = 5, scale: float = 20.0, second_best: float = 0.0) -> Path:
    """Write an EAGLE-3 draft (vLLM's own dialect, top-level after-k aux ids, no d2t).

    If the true next token is a multiple of `wrong_every` (0 = never), the draft's first choice is that token plus
    one. With `second_best` in (0, 1) the true token is then the second choice, at that share of the logit.

    How it works: q and k are constant, so that each row attends only to itself (RoPE lowers every other score). The
    value is onehot(token) minus the normed input state, which cancels the residual. So the layer holds
    amplitude * onehot(token) for any input state. The MLP (silu(x) x = x^2 for large x) moves it to the successor.
    """
    amplitude, query = 64.0, 14.0
    heads = HIDDEN // HEAD_DIM
    identity = torch.eye(HIDDEN)
    head = torch.eye(VOCAB)
    for token in range(0, VOCAB, wrong_every or VOCAB + 1):
        if wrong_every:
            head[token, token] = second_best
            head[(token + 1) % VOCAB, token] = 1.0
    constant = torch.zeros(HIDDEN, 2 * HIDDEN)
    constant[:, :HIDDEN] = query / ROOT_H
    weights = {
        "fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head * (scale / ROOT_H),
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "midlayer.input_layernorm.weight": torch.ones(HIDDEN),
        "midlayer.post_attention_layernorm.weight": torch.ones(HIDDEN),
        "midlayer.self_attn.q_proj.weight": constant,
        "midlayer.self_attn.k_proj.weight": constant.clone(),
        "midlayer.self_attn.v_proj.weight": torch.cat([identity, -identity], 1) / ROOT_H,
        "midlayer.self_attn.o_proj.weight": identity * amplitude,
        "midlayer.mlp.gate_proj.weight": identity.clone(),
        "midlayer.mlp.up_proj.weight": identity.clone(),
        "midlayer.mlp.down_proj.weight": (_successor_matrix() - identity) * amplitude / HIDDEN,
    }
    config = _config(
        heads,
        heads,
        architectures=["LlamaForCausalLMEagle3"],
        num_hidden_layers=1,
        draft_vocab_size=VOCAB,
        eagle_aux_hidden_state_layer_ids=list(AUX_LAYERS),
    )
    return save_checkpoint(folder, config, weights)
