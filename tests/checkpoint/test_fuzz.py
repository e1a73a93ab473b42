"""Any checkpoint is either read or refused with a CheckpointError (seconds; minutes with FUZZ_EXAMPLES)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from dialects import DIALECTS, Dims, draft_tensors, target_config, write_dialect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_eagle3.checkpoint import CheckpointError, check_draft, resolve_config
from vllm_eagle3.config import Eagle3Options

DIMS = Dims()
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
# Wrong values of which a reader may detect only some.
awkward = st.sampled_from(
    [0, -1, 1 << 40, 10**400, True, [], {}, "", "llama", [None], [[]], {"rope_type": 7}, 1e308, [1, 2, 3]]
)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    return {
        dialect: write_dialect(
            folder / dialect, dialect, draft_tensors(DIMS), DIMS, aux_layers=(3, 6, 11), norm_output=True
        )
        for dialect in DIALECTS
    }


def keys_of(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """All keys of a config and of the objects in it."""
    nested = [
        (key, *rest) for key, value in config.items() if isinstance(value, dict) for rest in keys_of(value)
    ]
    return [(key,) for key in config] + nested


EXTRA = (
    "layer_types",
    "rope_parameters",
    "quantization_config",
    "num_aux_layers",
    "sliding_window",
    "rms_norm_eps",
)


@fuzz
@given(data=st.data(), dialect=st.sampled_from(DIALECTS), value=json_values | awkward)
def test_any_value_in_config_json(
    drafts: dict[str, Path], data: st.DataObject, dialect: str, value: object
) -> None:
    config = json.loads((drafts[dialect] / "config.json").read_text())
    path = data.draw(st.sampled_from([*keys_of(config), *((key,) for key in EXTRA)]))
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        resolve_config(config, source="config.json", target_config=target_config(DIMS))
    except CheckpointError as error:
        assert len(str(error)) < 2000 and "config.json" in str(error)


@fuzz
@given(key=st.sampled_from(list(target_config(DIMS))) | st.just("text_config"), value=json_values | awkward)
def test_any_value_in_the_targets_config_json(drafts: dict[str, Path], key: str, value: object) -> None:
    config = json.loads((drafts["specforge"] / "config.json").read_text())
    try:
        resolve_config(config, source="config.json", target_config=target_config(DIMS) | {key: value})
    except CheckpointError as error:
        assert len(str(error)) < 2000


@fuzz
@given(data=st.data(), name=st.sampled_from(["config.json", "model.safetensors", "pytorch_model.bin"]))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    """Some bytes of a good file are replaced, cut off or added."""
    folder = tmp_path_factory.mktemp("bytes")
    files = "bin" if name.endswith(".bin") else "safetensors"
    write_dialect(folder, "specforge", draft_tensors(DIMS), DIMS, aux_layers=(3, 6, 11), files=files)
    content = (folder / name).read_bytes()
    at = data.draw(st.integers(0, min(len(content), 4096)))
    new = data.draw(st.binary(max_size=16))
    rest = content[at + len(new) :] if data.draw(st.booleans()) else content[at:]
    (folder / name).write_bytes(content[:at] + new + (rest if data.draw(st.integers(0, 4)) else b""))
    try:
        check_draft(folder, target_config(DIMS))
    except CheckpointError as error:
        assert str(folder) in str(error)
    for file in folder.iterdir():
        file.unlink()


@fuzz
@given(
    options=json_values
    | st.dictionaries(
        st.sampled_from(
            ["aux_layers", "tree", "graft", "policy", "draft_sampling", "fused_kernels", "int8_draft"]
        ),
        json_values | awkward,
    )
    | st.fixed_dictionaries(
        {"tree": st.dictionaries(st.sampled_from(["depth", "topk", "nodes"]), json_values | awkward)}
    )
)
def test_any_options(options: object) -> None:
    try:
        Eagle3Options.from_additional_config({"eagle3": options})
    except ValueError as error:
        assert "eagle3" in str(error)
