"""Tensors of the four dialects become the same canonical tensors; wrong ones are refused (a few seconds)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dialects import DIALECTS, Dims, draft_tensors, target_config, write_dialect
from torch import Tensor

from vllm_eagle3.checkpoint import CheckpointError, canonical_tensors, read_checkpoint, resolve_config

DIMS = Dims()
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
Q, BIAS = "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.bias"


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def canonical(
    tensors: dict[str, Tensor], dims: Dims = DIMS, notes: list[str] | None = None, **config: Any
) -> dict[str, Tensor]:
    """The canonical tensors of a flat draft of `dims`, from tensors with any names."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dims.hidden,
        "target_hidden_size": dims.target_hidden,
        "intermediate_size": dims.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab,
        "draft_vocab_size": dims.draft_vocab,
        "max_position_embeddings": dims.max_position,
    }
    draft = resolve_config(values | config, source="config.json")
    return dict(canonical_tensors(draft, tensors.items(), source="weights.bin", notes=notes))


def refuses(tensors: dict[str, Tensor], *parts: str, **config: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        canonical(tensors, **config)
    assert str(error.value).startswith("weights.bin: ")
    for part in parts:
        assert part in str(error.value)


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    assert tensors.keys() >= set(names)
    return {name: tensor for name, tensor in tensors.items() if name not in names}


CASES = {
    "plain": (Dims(), {}),
    "qwen3": (Dims(model_type="qwen3"), {}),
    "no draft vocabulary": (Dims(draft_vocab=96), {}),
    "multi-head": (Dims(kv_heads=4, head_dim=16), {}),
    "own width": (Dims(target_hidden=48), {}),
    "eagle 3.1": (Dims(), {"fc_norm": True}),
    "norm before fc": (Dims(target_hidden=48), {"norm_before_fc": True}),
    "biases": (Dims(), {"attention_bias": True}),
    "embedding": (Dims(), {"embed_tokens": True}),
    "bfloat16": (Dims(), {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_same_weights_in_every_dialect(tmp_path: Path, dialect: str, case: str) -> None:
    dims, made = CASES[case]
    tensors = draft_tensors(dims, **made)
    flags = {key: value for key, value in made.items() if key not in ("embed_tokens", "dtype")}
    write_dialect(tmp_path, dialect, tensors, dims, aux_layers=(3, 6, 11), norm_before_residual=True, **flags)
    checkpoint = read_checkpoint(tmp_path, target_config(dims))
    same(dict(checkpoint.tensors()), tensors)
    assert checkpoint.config.aux_layers == (3, 6, 11) and checkpoint.config.norm_before_residual


def test_tensors_are_streamed_and_maps_come_last() -> None:
    tensors = draft_tensors(DIMS)
    draft = resolve_config(_flat_config(), source="")
    served: list[str] = []

    def weights() -> Any:
        for name in sorted(tensors):  # d2t comes first
            served.append(name)
            yield name, tensors[name]

    stream = canonical_tensors(draft, weights(), source="")
    assert next(stream)[0] == "fc.weight" and served == ["d2t", "fc.weight"]
    assert [name for name, _ in stream][-2:] == ["d2t", "t2d"]


def _flat_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "draft_vocab_size": 40,
        "max_position_embeddings": 128,
    }


# Maps, head, embedding


def test_absolute_and_missing_maps_become_offsets() -> None:
    tensors = draft_tensors(DIMS)
    absolute = tensors | {"d2t": tensors["d2t"] + torch.arange(40)}
    for variant in (absolute, without(absolute, "t2d"), without(tensors, "d2t"), without(tensors, "t2d")):
        same(canonical(variant), tensors)
    refuses(without(tensors, "d2t", "t2d"), "d2t or t2d is needed")


def test_maps_of_a_draft_without_a_vocabulary_of_its_own() -> None:
    dims = Dims(draft_vocab=96)
    tensors = draft_tensors(dims)
    maps = {"d2t": torch.zeros(96, dtype=torch.int64), "t2d": torch.ones(96, dtype=torch.bool)}
    same(canonical(tensors | maps, dims), tensors)
    swapped = torch.zeros(96, dtype=torch.int64)
    swapped[:2] = torch.tensor([1, -1])
    with pytest.raises(CheckpointError, match="each id has to map to itself; 2 do not"):
        canonical(tensors | {"d2t": swapped}, dims)


@pytest.mark.parametrize("dims", [Dims(), Dims(draft_vocab=96)])
def test_missing_head_is_the_targets(dims: Dims) -> None:
    tensors = without(draft_tensors(dims), HEAD)
    notes: list[str] = []
    same(canonical(tensors, dims, notes), tensors)
    own = dims.draft_vocab < dims.vocab
    assert any(note == "lm_head: missing, so the target's head" + ", rows i + d2t[i]" * own for note in notes)
    assert any(note.startswith("embed_tokens: missing") for note in notes)


def test_missing_head_of_another_width_is_an_error() -> None:
    dims = Dims(target_hidden=48)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight \[40, 32\]; the target's head.* width is 48 and not 32"
    ):
        canonical(without(draft_tensors(dims), HEAD), dims)
    with pytest.raises(CheckpointError, match=r"missing tensors: embed_tokens.weight \[96, 32\]"):
        canonical(without(draft_tensors(dims), EMBEDDING), dims)


@pytest.mark.parametrize("first", [HEAD, "d2t"])
def test_full_head_is_cut_to_the_draft_vocabulary(first: str) -> None:
    tensors = draft_tensors(DIMS)
    full = torch.randn(96, 32)
    expected = tensors | {HEAD: full[tensors["t2d"]]}
    found = canonical({first: full if first == HEAD else tensors["d2t"]} | tensors | {HEAD: full})
    same(found, expected)


def test_tied_embedding_is_the_head_only_where_none_is_shipped() -> None:
    tensors = draft_tensors(DIMS, embed_tokens=True)
    same(canonical(tensors, tie_word_embeddings=True), tensors)
    tied = canonical(without(tensors, HEAD), tie_word_embeddings=True)
    assert torch.equal(tied[HEAD], tensors[EMBEDDING][tensors["t2d"]])
    assert HEAD not in canonical(without(tensors, HEAD), tie_word_embeddings=False)


# Names


def test_old_names() -> None:
    tensors = draft_tensors(DIMS, fc_norm=True)
    names = {
        f"fc_norm.{i}.weight": f"aux_norm_{part}.weight" for i, part in enumerate(("low", "mid", "high"))
    }
    old = {
        names.get(name, name.replace("layers.0.", "midlayer.")): tensor for name, tensor in tensors.items()
    }
    old["midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    same(canonical(old, use_aux_norm=True), tensors)


def test_missing_output_bias_is_zero() -> None:
    tensors = draft_tensors(DIMS, attention_bias=True, dtype=torch.bfloat16)
    name = "layers.0.self_attn.o_proj.bias"
    expected = tensors | {name: torch.zeros(32, dtype=torch.bfloat16)}
    same(canonical(without(tensors, name), attention_bias=True), expected)


@pytest.mark.parametrize("name", [name for name in draft_tensors(DIMS) if name not in (HEAD, "d2t", "t2d")])
def test_every_tensor_is_required_and_has_its_shape(name: str) -> None:
    tensors = draft_tensors(DIMS)
    refuses(without(tensors, name), f"missing tensors: {name} {list(tensors[name].shape)}")
    wrong = torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)
    refuses(
        tensors | {name: wrong}, f"{name}: expected {list(tensors[name].shape)}, found {list(wrong.shape)}"
    )
    refuses(tensors | {name: tensors[name][None]}, f"{name}: expected")


@pytest.mark.parametrize(
    ("made", "config", "name"),
    [
        ({"fc_norm": True}, {"fc_norm": True}, "fc_norm.2.weight"),
        ({"norm_before_fc": True}, {"norm_before_fc": True}, "input_norm.weight"),
        ({"attention_bias": True}, {"attention_bias": True}, "layers.0.self_attn.k_proj.bias"),
    ],
)
def test_optional_parts_are_required_where_the_config_says_so(
    made: dict[str, Any], config: dict[str, Any], name: str
) -> None:
    tensors = draft_tensors(DIMS, **made)
    same(canonical(tensors, **config), tensors)
    refuses(without(tensors, name), f"missing tensors: {name}", **config)
    refuses(tensors | {name: tensors[name][:-1]}, f"{name}: expected", **config)
    refuses(tensors, "unknown tensor", "config.json")  # the flag is not set


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("mask_hidden", (96,), "P-EAGLE"),
        ("layers.0.self_attn.q_proj.weight_scale", (1,), "no quantization_config"),
        ("layers.0.self_attn.q_norm.weight", (8,), "llama layer, not a qwen3"),
        ("layers.1.norm.weight", (32,), "num_hidden_layers is 1"),
        (BIAS, (32,), "attention_bias"),
        ("verifier_norm.weight", (32,), "expected embed_tokens.weight, fc.weight"),
        (EMBEDDING, (97, 32), "expected [96, 32], found [97, 32] (vocab_size 96"),
        (HEAD, (41, 32), "expected [40, 32], found [41, 32] (draft_vocab_size 40"),
        ("fc.weight", (32, 64), "EAGLE-1 or EAGLE-2"),
        ("fc.weight", (32, 160), "3 x target_hidden_size 32"),
    ],
)
def test_what_a_wrong_tensor_tells(name: str, shape: tuple[int, ...], part: str) -> None:
    refuses(draft_tensors(DIMS) | {name: torch.zeros(shape)}, name, part)


def test_two_names_of_one_tensor() -> None:
    tensors = draft_tensors(DIMS)
    refuses(tensors | {Q.replace("layers.0.", "midlayer."): tensors[Q]}, "are the same tensor", Q)


def test_quantised_draft() -> None:
    tensors = draft_tensors(DIMS)
    quantised = {"quantization_config": {"quant_method": "compressed-tensors"}}
    fp8 = tensors | {Q: tensors[Q].to(torch.float8_e4m3fn), Q + "_scale": torch.ones(32, 1)}
    assert canonical(fp8, **quantised).keys() == fp8.keys()
    packed = without(tensors, Q) | {Q + "_packed": torch.zeros(32, 8, dtype=torch.int32)}
    assert canonical(packed, **quantised).keys() == packed.keys()
    nvfp4 = tensors | {Q: torch.zeros(32, 32, dtype=torch.uint8)}
    assert canonical(nvfp4, **quantised).keys() == nvfp4.keys()
    refuses(packed, "unknown tensor", "no quantization_config")
    refuses(without(tensors, Q), "missing tensors", Q, **quantised)
    refuses(fp8 | {Q: fp8[Q][:1]}, Q, "found [1, 64]", **quantised)
    full = tensors | {HEAD: torch.zeros(96, 32), "lm_head.weight_scale": torch.ones(96, 1)}
    refuses(full, "rows of a quantised head", **quantised)


def test_drafts_left_to_stock_are_not_read() -> None:
    with pytest.raises(CheckpointError, match="vLLM's own EAGLE-3 serves this draft: a draft of 2 layers"):
        canonical(draft_tensors(DIMS), num_hidden_layers=2)
