"""config.json of the four dialects becomes one canonical form; ambiguous configs are refused (under a second)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from dialects import DIALECTS, IDS, Dims, draft_tensors, target_config, write_dialect

from vllm_eagle3.checkpoint import CheckpointError, DraftConfig, default_aux_layers, resolve_config

DIMS = Dims()
TARGET = target_config(DIMS)


def config_of(folder: Path, dialect: str, dims: Dims = DIMS, **flags: Any) -> dict[str, Any]:
    write_dialect(folder, dialect, draft_tensors(dims), dims, **flags)
    return json.loads((folder / "config.json").read_text())


def resolve(config: dict[str, Any], target: dict[str, Any] | None = TARGET, **kwargs: Any) -> DraftConfig:
    return resolve_config(config, source="draft/config.json", target_config=target, **kwargs)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_golden(tmp_path: Path, dialect: str) -> None:
    got = resolve(
        config_of(tmp_path, dialect, aux_layers=(3, 6, 11), norm_before_residual=True, norm_output=True)
    )
    assert got.dialect == dialect
    assert dataclasses.replace(got, dialect="", notes=()) == DraftConfig(
        dialect="",
        layer_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 96,
            "max_position_embeddings": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention"],
            "use_sliding_window": False,
            "sliding_window": None,
        },
        hidden_size=32,
        target_hidden_size=32,
        vocab_size=96,
        draft_vocab_size=40,
        aux_layers=(3, 6, 11),
        max_position_embeddings=128,
        norm_before_residual=True,
        norm_output=True,
    )


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_flag_reaches_the_canonical_form(tmp_path: Path, dialect: str, flag: str) -> None:
    got = resolve(config_of(tmp_path, dialect, **{flag: True}))
    flags = {
        name
        for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        if getattr(got, name)
    }
    assert flags == {flag}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_layer_config_builds_the_hf_config(tmp_path: Path, dialect: str, model_type: str) -> None:
    from transformers import LlamaConfig, Qwen3Config

    layer = resolve(config_of(tmp_path, dialect, Dims(model_type=model_type))).layer_config
    hf = {"llama": LlamaConfig, "qwen3": Qwen3Config}[layer["model_type"]](**layer)
    assert layer["model_type"] == model_type
    for key, value in layer.items():
        assert getattr(hf, key) == value, key


# Aux layers


@pytest.mark.parametrize("dialect", DIALECTS)
def test_missing_ids_are_the_default(tmp_path: Path, dialect: str) -> None:
    config = config_of(tmp_path, dialect)
    got = resolve(config)
    assert got.aux_layers == (2, 6, 9) == default_aux_layers(12)
    assert any("default (2, n//2, n-3) for 12 layers" in note for note in got.notes)
    assert resolve(config, target=None).aux_layers is None


@pytest.mark.parametrize("layers", range(12, 129))
def test_modelopts_default_ids(tmp_path: Path, layers: int) -> None:
    """Its trainer writes the ids as a set, which Python orders by hash: for 32 layers [1, 28, 15]."""
    ids = list({1, layers // 2 - 1, layers - 4})
    config = config_of(tmp_path, "modelopt")
    config["eagle_config"][IDS] = ids
    got = resolve(config, target_config(DIMS, num_hidden_layers=layers))
    assert got.aux_layers == default_aux_layers(layers)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("ids", [(4,), (3, 6), (3, 6, 9, 11), (1, 3, 5, 7, 12)])
def test_any_number_of_states(tmp_path: Path, dialect: str, ids: tuple[int, ...]) -> None:
    if dialect in ("specforge", "modelopt") and 12 in ids:
        ids = (1, 3, 5, 7, 11)
    config = config_of(tmp_path, dialect, aux_layers=ids)
    got = resolve(config)
    assert got.aux_layers == ids and got.num_aux_hidden_states == len(ids)
    assert resolve(config | {"num_aux_hidden_states": len(ids)}) == got
    with pytest.raises(CheckpointError, match=f"states 6 aux hidden states, but there are {len(ids)}"):
        resolve(config | {"num_aux_layers": 6})


def test_a_number_of_states_without_ids(tmp_path: Path) -> None:
    config = config_of(tmp_path, "specforge") | {"num_aux_hidden_states": 5}
    with pytest.raises(CheckpointError, match="states 5 aux hidden states but names no layers.*aux_layers"):
        resolve(config)
    got = resolve(config, aux_layers=[1, 3, 5, 7, 9])
    assert got.num_aux_hidden_states == 5
    with pytest.raises(CheckpointError, match="contradictory numbers"):
        resolve(config | {"num_aux_layers": 3})
    with pytest.raises(CheckpointError, match="num_aux_hidden_states: expected a positive integer"):
        resolve(config | {"num_aux_hidden_states": 0})


@pytest.mark.parametrize("place", ["top", "nested"])
def test_an_empty_list_of_ids_means_the_default(tmp_path: Path, place: str) -> None:
    config = config_of(tmp_path, "specforge")
    (config if place == "top" else config["eagle_config"])[IDS] = []
    assert resolve(config).aux_layers == (2, 6, 9)


def test_real_layer_ids_of_the_field(tmp_path: Path) -> None:
    """(ids, target layers) -> after-k ids: gpt-oss-120b v3 names boundaries, the others layer outputs."""
    config = config_of(tmp_path, "modelopt")
    for ids, layers, expected in (
        ([1, 17, 33], 36, (2, 18, 34)),
        ([1, 29, 57], 61, (2, 30, 58)),
        ([24, 30, 36], 36, (24, 30, 36)),
        ([0, 1, 35], 36, (1, 2, 36)),
        ([-1, 1, 2], 36, (0, 2, 3)),
    ):
        config["eagle_config"][IDS] = ids
        assert resolve(config, target_config(DIMS, num_hidden_layers=layers)).aux_layers == expected


def test_nested_ids_that_look_like_the_default_are_pointed_out(tmp_path: Path) -> None:
    config = config_of(tmp_path, "specforge", aux_layers=(3, 31, 59))
    got = resolve(config, target_config(DIMS, num_hidden_layers=61))
    assert got.aux_layers == (3, 31, 59)
    assert any("try aux_layers [2, 30, 58]" in note for note in got.notes)


def test_speculators_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    assert resolve(config_of(tmp_path, "speculators", aux_layers=(1, 2, 12))).aux_layers == (1, 2, 12)


def test_flat_top_level_ids_are_read_as_vllm_does_and_said(tmp_path: Path) -> None:
    got = resolve(config_of(tmp_path, "safeailab", aux_layers=(1, 5, 10)))
    assert got.aux_layers == (1, 5, 10)
    assert any("after-k, as vLLM reads it" in note for note in got.notes)


def test_eagle_config_layer_ids(tmp_path: Path) -> None:
    config = config_of(tmp_path, "specforge") | {"eagle_config": {"layer_ids": [1, 5, 10]}}
    assert resolve(config).aux_layers == (1, 5, 10)


def test_option_wins_over_everything(tmp_path: Path) -> None:
    config = config_of(tmp_path, "modelopt", aux_layers=(3, 6, 11)) | {IDS: [7, 7, 7]}
    got = resolve(config, aux_layers=[1, 5, 10])
    assert got.aux_layers == (1, 5, 10)
    assert any("from the option" in note for note in got.notes)


def test_two_places_that_agree_and_two_that_do_not(tmp_path: Path) -> None:
    config = config_of(tmp_path, "specforge", aux_layers=(3, 6, 11))
    assert resolve(config | {IDS: [3, 6, 11]}).aux_layers == (3, 6, 11)
    with pytest.raises(CheckpointError, match="contradictory aux-layer ids.*aux_layers"):
        resolve(config | {IDS: [2, 5, 10]})


@pytest.mark.parametrize("layers", [1, 2, 4, 5, 6])
def test_default_ids_of_a_shallow_target_are_an_error_that_names_the_option(
    tmp_path: Path, layers: int
) -> None:
    config = config_of(tmp_path, "safeailab")
    target = target_config(DIMS, num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match="not strictly increasing.*set the option aux_layers"):
        resolve(config, target)
    assert resolve(config, target_config(DIMS, num_hidden_layers=7)).aux_layers == (2, 3, 4)


@pytest.mark.parametrize(
    "ids",
    [[3, 3, 6], [9, 6, 3], [3, 6, 13], [-1, 3, 6], [True, 3, 6], "3,6,9", [1.0, 2, 3], 7],
)
def test_bad_ids(tmp_path: Path, ids: object) -> None:
    config = config_of(tmp_path, "speculators") | {IDS: ids}
    with pytest.raises(CheckpointError, match=rf"draft/config.json: {IDS}: expected"):
        resolve(config)
    with pytest.raises(CheckpointError, match="the option aux_layers: expected"):
        resolve(config_of(tmp_path, "safeailab"), aux_layers=ids)


# Other conventions


def test_speculators_without_norm_before_residual_follows_vllm_loudly(tmp_path: Path) -> None:
    config = config_of(tmp_path, "speculators")
    del config["norm_before_residual"]
    got = resolve(config)
    assert got.norm_before_residual is True
    assert any("norm_before_residual: MISSING" in note for note in got.notes)
    flat = config_of(tmp_path, "specforge")
    del flat["norm_before_residual"]
    assert resolve(flat).norm_before_residual is False


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            {"rope_theta": 5e5, "rope_type": "default", "mrope_section": [2, 1, 1]},
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 32.0}},
            {"rope_theta": 1e6, "rope_type": "yarn", "factor": 32.0},
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
            {"rope_theta": 1e6, "rope_type": "default"},
        ),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
            {"rope_theta": 5e5, "rope_type": "default"},
        ),
        ({}, {"rope_theta": 10000.0, "rope_type": "default"}),
    ],
)
def test_rope_of_both_generations(tmp_path: Path, rope: dict[str, Any], expected: dict[str, Any]) -> None:
    for dialect in ("specforge", "speculators"):
        config = config_of(tmp_path, dialect)
        layer = config.get("transformer_layer_config", config)
        for key in ("rope_theta", "rope_scaling", "rope_parameters"):
            layer.pop(key, None)
        layer |= rope
        got = resolve(config)
        assert got.layer_config["rope_parameters"] == expected
        assert any("rope_theta: missing" in note for note in got.notes) == (not rope)


def test_contradictory_rope_bases(tmp_path: Path) -> None:
    config = config_of(tmp_path, "specforge") | {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}
    with pytest.raises(CheckpointError, match="rope_theta 500000.0 contradicts 10000.0"):
        resolve(config)


def test_sliding_window_of_the_one_layer(tmp_path: Path) -> None:
    config = config_of(tmp_path, "speculators", Dims(model_type="qwen3"))
    layer = config["transformer_layer_config"]
    layer |= {"sliding_window": 64, "layer_types": ["full_attention"] * 36}
    assert resolve(config).layer_config["sliding_window"] is None
    layer["layer_types"] = ["sliding_attention"] * 36
    layer = resolve(config).layer_config
    assert (layer["layer_types"], layer["sliding_window"], layer["use_sliding_window"]) == (
        ["sliding_attention"],
        64,
        True,
    )


def test_short_draft_and_other_architecture_are_noted(tmp_path: Path) -> None:
    config = config_of(tmp_path, "speculators")
    target = target_config(DIMS, max_position_embeddings=4096, architectures=["Qwen3ForCausalLM"])
    notes = "\n".join(resolve(config, target).notes)
    assert "128, shorter than the target's 4096" in notes
    assert "trained on a/target (LlamaForCausalLM), this target is Qwen3ForCausalLM" in notes


@pytest.mark.parametrize("dialect", DIALECTS)
def test_draft_for_another_target(tmp_path: Path, dialect: str) -> None:
    config = config_of(tmp_path, dialect)
    for overrides, part in (
        ({"hidden_size": 64}, "hidden size is 32, but this target's is 64"),
        ({"vocab_size": 128}, "vocabulary is 96, but this target's is 128"),
    ):
        with pytest.raises(CheckpointError, match="draft/config.json: made for another target") as error:
            resolve(config, target_config(DIMS, **overrides))
        assert part in str(error.value)


def test_multimodal_target(tmp_path: Path) -> None:
    config = config_of(tmp_path, "safeailab")
    nested = {"architectures": ["LlavaForConditionalGeneration"], "hidden_size": 7, "text_config": TARGET}
    assert resolve(config, nested).aux_layers == (2, 6, 9)


def test_own_hidden_size(tmp_path: Path) -> None:
    dims = Dims(hidden=32, target_hidden=48)
    for dialect in DIALECTS:
        got = resolve(config_of(tmp_path, dialect, dims), target_config(dims))
        assert (got.hidden_size, got.target_hidden_size) == (32, 48)


# Left to stock vLLM


@pytest.mark.parametrize(
    ("dialect", "change", "part"),
    [
        ("modelopt", {"architectures": ["Eagle3DeepseekV2ForCausalLM"], "kv_lora_rank": 512}, "MLA"),
        ("modelopt", {"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "Eagle3DeepseekV2ForCausalLM"),
        ("specforge", {"architectures": ["GptOssForCausalLMEagle3"]}, "GptOssForCausalLMEagle3"),
        ("safeailab", {"num_hidden_layers": 2}, "2 layers"),
        ("specforge", {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ("modelopt", {"eagle_config": {"parallel_draft_step": 4}}, "parallel_draft_step is 4"),
        ("speculators", {"speculators_model_type": "peagle", "mask_token_id": 5}, "'peagle'"),
        ("speculators", {"mask_token_id": 5}, "P-EAGLE"),
        ("safeailab", {"pard_token": 5}, "P-EAGLE"),
        ("speculators", {"transformer_layer_config": {"model_type": "gemma3"}}, "'gemma3'"),
    ],
)
def test_left_to_stock_vllm(tmp_path: Path, dialect: str, change: dict[str, Any], part: str) -> None:
    got = resolve(config_of(tmp_path, dialect) | change)
    assert got.unsupported_reason is not None and part in got.unsupported_reason
    assert got.dialect == dialect


@pytest.mark.parametrize("dialect", DIALECTS)
def test_supported_drafts_have_no_reason(tmp_path: Path, dialect: str) -> None:
    assert resolve(config_of(tmp_path, dialect)).unsupported_reason is None


# Wrong values


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"hidden_size": None}, "hidden_size: expected a positive integer, found None"),
        ({"hidden_size": "32"}, "hidden_size: expected a positive integer, found '32'"),
        ({"num_hidden_layers": None}, "num_hidden_layers: expected"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"head_dim": None, "num_attention_heads": 6, "num_key_value_heads": 6}, "no head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"attention_bias": "no"}, "attention_bias: expected true or false, found 'no'"),
        ({"rope_scaling": 4}, "rope_scaling: expected an object, found 4"),
    ],
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_bad_layer_values(tmp_path: Path, dialect: str, change: dict[str, Any], part: str) -> None:
    config = config_of(tmp_path, dialect)
    config.get("transformer_layer_config", config).update(change)
    with pytest.raises(CheckpointError) as error:
        resolve(config)
    assert str(error.value).startswith("draft/config.json: ") and part in str(error.value)


@pytest.mark.parametrize(
    ("dialect", "change", "part"),
    [
        ("specforge", {"draft_vocab_size": 97}, "draft_vocab_size 97 exceeds vocab_size 96"),
        ("specforge", {"fc_norm": 1}, "fc_norm: expected true or false, found 1"),
        ("specforge", {"eagle_config": [1, 2, 3]}, "eagle_config: expected an object"),
        (
            "modelopt",
            {"eagle_config": {"use_last_layernorm": False}},
            "eagle_config.use_last_layernorm: expected True",
        ),
        (
            "modelopt",
            {"eagle_config": {"use_mtp_layernorm": True}},
            "eagle_config.use_mtp_layernorm: expected False",
        ),
        ("speculators", {"transformer_layer_config": None}, "transformer_layer_config: expected an object"),
    ],
)
def test_bad_draft_values(tmp_path: Path, dialect: str, change: dict[str, Any], part: str) -> None:
    with pytest.raises(CheckpointError) as error:
        resolve(config_of(tmp_path, dialect) | change)
    assert part in str(error.value)


def test_sizes_left_out_have_their_usual_meaning(tmp_path: Path) -> None:
    config = config_of(tmp_path, "safeailab")
    for key in ("head_dim", "num_key_value_heads", "draft_vocab_size", "rms_norm_eps"):
        del config[key]
    got = resolve(config)
    assert (got.layer_config["head_dim"], got.layer_config["num_key_value_heads"], got.draft_vocab_size) == (
        8,
        4,
        96,
    )
    assert any("rms_norm_eps: missing" in note for note in got.notes)
