"""Targets of other families: what is not supported is refused by name, what is supported is right (20 s)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
)
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_eagle3.reference.draft import DraftModel, rotate
from vllm_eagle3.reference.rope import rope_frequencies
from vllm_eagle3.training.data import Batch
from vllm_eagle3.training.features import Target, check_target, target_rope
from vllm_eagle3.training.initialize import norm_gain

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    YARN,
    YARN | {"attention_factor": 1.25, "truncate": False},
    YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "partial_rotary_factor": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: "-".join(str(v) for v in r.values()))
def test_rotation_is_vllms(rope: dict[str, Any], default_vllm_config: None) -> None:
    """Queries and keys as vLLM's layer rotates them when it serves the draft."""
    torch.manual_seed(0)
    layer = get_rope(32, 256, True, rope, dtype=torch.float32)
    positions = torch.tensor([0, 1, 17, 100, 200])
    q, k = torch.randn(5, 2 * 32), torch.randn(5, 32)
    want_q, want_k = layer.forward_native(positions, q.clone(), k.clone())
    inv, scale = rope_frequencies(rope, 32)
    angles = positions[:, None] * inv
    cos, sin = angles.cos() * scale, angles.sin() * scale
    for x, want in ((q, want_q), (k, want_k)):
        got = rotate(x.unflatten(-1, (-1, 32)), cos, sin).flatten(1)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.fixture
def default_vllm_config() -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.mark.parametrize(
    ("name", "config", "model"),
    [
        ("softcap", Gemma2Config(**SIZES, final_logit_softcapping=3.0), Gemma2ForCausalLM),
        ("scale", Cohere2Config(**SIZES, logit_scale=0.25), Cohere2ForCausalLM),
        ("scaling", GraniteConfig(**SIZES, logits_scaling=4.0), GraniteForCausalLM),
    ],
)
def test_logits_that_are_scaled_or_capped(name: str, config: Any, model: Any, tmp_path: Path) -> None:
    """The teacher's distribution is the one that the target samples from."""
    torch.manual_seed(0)
    model(config).float().save_pretrained(tmp_path)
    target = Target(tmp_path, (1, 2, 3), torch.float32)
    ids = torch.arange(10)
    last = target.features(Batch(ids, torch.ones(10, dtype=torch.bool), torch.tensor([10]))).last
    want = target.model(ids[None]).logits[0]
    torch.testing.assert_close(target.head.logits(last), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(last @ target.head.weight.T, want, atol=1e-2), "the case matters"
    torch.testing.assert_close(
        target.head.of(torch.tensor([3, 9])).logits(last), want[:, [3, 9]], atol=1e-4, rtol=1e-4
    )


def test_a_head_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25)).float().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    target = Target(tmp_path, (1, 2, 3), torch.float32)
    target.head = type(target.head)(target.head.weight)
    with pytest.raises(ValueError, match="logits are not its head times its last state"):
        target._check_head()
    assert config.logit_scale == 0.25


def test_gemmas_norm_is_one_plus_its_weight() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    norm = Gemma2RMSNorm(8)
    norm.weight.data = torch.randn(8)
    torch.testing.assert_close(norm_gain(norm, torch.zeros(8)), 1 + norm.weight.data, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "found 'dynamic'"),
        ({"num_hidden_layers": 5}, "at least 7 layers, found 5"),
    ],
)
def test_refused_before_any_weight_is_read(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    LlamaConfig(**SIZES | change).save_pretrained(tmp_path)  # no weights beside it
    with pytest.raises(ValueError, match=message):
        check_target(tmp_path)


def test_other_modalities_are_refused(tmp_path: Path) -> None:
    from transformers import LlavaConfig

    LlavaConfig(text_config=LlamaConfig(**SIZES).to_dict()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a vision_config"):
        check_target(tmp_path)


def test_rope_of_one_dict_a_layer_type() -> None:
    """Gemma 3: the draft's layer has full attention, so it takes the parameters of that."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(**SIZES)
    assert "full_attention" in config.rope_parameters
    rope = target_rope(config)
    assert rope["rope_theta"] == config.rope_parameters["full_attention"]["rope_theta"]
    rope_frequencies(rope, 8)


def test_a_draft_of_a_partly_rotated_target(tmp_path: Path) -> None:
    """Half of each head is left alone, in training as in the config that vLLM reads."""
    from vllm_eagle3.reference.config import PlainDraftConfig
    from vllm_eagle3.reference.draft import load_draft
    from vllm_eagle3.training.export import export

    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "target_hidden_size": 32,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = PlainDraftConfig(
        **sizes, **heads, draft_vocab_size=64, aux_layers=(1, 2, 3), rope_parameters=rope
    )
    model = DraftModel(config)
    assert model.rotary(torch.arange(3))[0].shape == (3, 2)
    loaded = load_draft(export(model, tmp_path))
    assert loaded.config.rope_parameters["partial_rotary_factor"] == 0.5
