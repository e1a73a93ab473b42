"""Compares how this project, vLLM and transformers read the same configs (15 s: imports vLLM)."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from dialects import DIALECTS, Dims, draft_tensors, write_dialect
from transformers import AutoConfig, LlamaConfig

from vllm_eagle3.checkpoint import resolve_config
from vllm_eagle3.checkpoint.stock import LLAMA, QWEN3

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@pytest.mark.parametrize("given", [{}, dict.fromkeys(FLAGS, True), dict.fromkeys(FLAGS, False)])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_speculators_configs_mean_what_vllm_reads(
    tmp_path: Path, given: dict[str, bool], model_type: str
) -> None:
    speculators = pytest.importorskip("vllm.transformers_utils.configs.speculators")
    dims = Dims(model_type=model_type)
    write_dialect(tmp_path, "speculators", draft_tensors(dims), dims, aux_layers=(3, 6, 11))
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in FLAGS} | given
    ours = resolve_config(config, source="")
    theirs = speculators.SpeculatorsConfig.extract_transformers_pre_trained_config(config)
    for key in (*FLAGS, "draft_vocab_size", "target_hidden_size"):
        assert getattr(ours, key) == theirs[key], key
    assert ours.aux_layers == tuple(theirs["eagle_aux_hidden_state_layer_ids"])


def test_our_architectures_are_vllms_classes() -> None:
    registry = pytest.importorskip("vllm.model_executor.models.registry")
    for names, module in ((LLAMA, "llama_eagle3"), (QWEN3, "qwen3_eagle3")):
        for name in names:
            eagle3 = name if "Eagle3" in name else f"Eagle3{name}"  # as EAGLEConfig names it
            assert registry._SPECULATIVE_DECODING_MODELS[eagle3][0] == module


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 32.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        {},
    ],
)
def test_rope_is_what_transformers_reads(tmp_path: Path, rope: dict[str, Any]) -> None:
    dims = Dims()
    write_dialect(tmp_path, "safeailab", draft_tensors(dims), dims)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope_")} | rope
    ours = LlamaConfig(**resolve_config(config, source="").layer_config).rope_parameters
    theirs = LlamaConfig(**copy.deepcopy(config)).rope_parameters
    assert ours == {key: value for key, value in theirs.items() if key != "type"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_vllms_config_object_gives_the_same_as_the_file(tmp_path: Path, dialect: str) -> None:
    eagle = pytest.importorskip("vllm.transformers_utils.configs.eagle")
    speculators = pytest.importorskip("vllm.transformers_utils.configs.speculators")
    dims = Dims()
    tensors = draft_tensors(dims, fc_norm=True)
    write_dialect(
        tmp_path, dialect, tensors, dims, aux_layers=(3, 6, 11), norm_before_residual=True, fc_norm=True
    )
    if dialect == "speculators":
        hf = speculators.SpeculatorsConfig.from_pretrained(tmp_path)
    else:
        hf = eagle.EAGLEConfig(AutoConfig.from_pretrained(tmp_path), method="eagle3", model_type="eagle")
    file = resolve_config(json.loads((tmp_path / "config.json").read_text()), source="")
    ours = resolve_config(hf.to_dict(), source="")
    assert {key: ours.layer_config[key] for key in file.layer_config} == file.layer_config
    different = {"layer_config": {}, "notes": (), "dialect": ""}
    assert dataclasses.replace(ours, **different) == dataclasses.replace(file, **different)
