"""Files of a checkpoint: safetensors, shards, .bin, both, broken ones. A few seconds."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from dialects import Dims, draft_tensors, target_config, write_dialect, write_weights
from safetensors.torch import save_file

from vllm_eagle3.checkpoint import CheckpointError, read_checkpoint

DIMS = Dims()
TENSORS = draft_tensors(DIMS)
INDEX = "model.safetensors.index.json"


def write(folder: Path, files: str = "safetensors") -> Path:
    return write_dialect(folder, "specforge", TENSORS, DIMS, files=files)


def fc(folder: Path) -> torch.Tensor:
    return dict(read_checkpoint(folder).tensors())["fc.weight"]


@pytest.mark.parametrize("files", ["safetensors", "sharded", "bin", "sharded bin"])
def test_every_kind_of_file(tmp_path: Path, files: str) -> None:
    checkpoint = read_checkpoint(write(tmp_path, files), target_config(DIMS))
    found = dict(checkpoint.tensors())
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert len(checkpoint.files) == (2 if "sharded" in files else 1)


def test_legacy_bin_without_zip(tmp_path: Path) -> None:
    write(tmp_path, "bin")
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(fc(tmp_path), TENSORS["fc.weight"])


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    write(tmp_path)
    write_weights(tmp_path, TENSORS | {"fc.weight": torch.zeros(32, 96)}, "bin")
    assert torch.equal(fc(tmp_path), TENSORS["fc.weight"])
    (tmp_path / "model.safetensors").unlink()
    assert not fc(tmp_path).any()


def test_safetensors_of_another_name(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "eagle.safetensors")
    assert torch.equal(fc(tmp_path), TENSORS["fc.weight"])


def test_target_by_directory(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(target_config(DIMS)))
    assert read_checkpoint(write(tmp_path / "draft"), tmp_path / "target").config.aux_layers == (2, 6, 9)


def test_modelopt_quantisation_file(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert "quantization_config" in read_checkpoint(tmp_path).config.layer_config


def refuses(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        list(read_checkpoint(folder).tensors())
    for part in parts:
        assert part in str(error.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", str(tmp_path / "nowhere" / "config.json"), "no such file")
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    refuses(tmp_path, "model.safetensors: not a readable safetensors file")
    (tmp_path / "model.safetensors").unlink()
    refuses(tmp_path, "no weights; expected model.safetensors", "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{")
    refuses(tmp_path, "config.json: not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refuses(tmp_path, "config.json: expected a JSON object, found list")


def test_pickled_objects_are_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "owned"),)  # type: ignore[return-value]

    write(tmp_path, "bin")
    for save in (lambda p: torch.save({"a": Payload()}, p), lambda p: p.write_bytes(pickle.dumps(Payload()))):
        save(tmp_path / "pytorch_model.bin")
        refuses(tmp_path, "pytorch_model.bin: expected a state dict of plain tensors", "weights_only=True")
    assert not (tmp_path / "owned").exists()
    torch.save({"fc.weight": 3}, tmp_path / "pytorch_model.bin")
    refuses(tmp_path, "expected a state dict of tensors, found int at 'fc.weight'")
    torch.save(torch.zeros(3), tmp_path / "pytorch_model.bin")
    refuses(tmp_path, "expected a state dict of tensors, found Tensor")


def test_index_and_shards_have_to_agree(tmp_path: Path) -> None:
    write(tmp_path, "sharded")
    index = json.loads((tmp_path / INDEX).read_text())
    shard = index["weight_map"].pop("fc.weight")
    (tmp_path / INDEX).write_text(json.dumps(index))
    refuses(tmp_path, f"{shard}: contradicts {INDEX}", "not in the index ['fc.weight']")
    index["weight_map"] |= {"fc.weight": shard, "ghost": shard}
    (tmp_path / INDEX).write_text(json.dumps(index))
    refuses(tmp_path, f"{shard}: contradicts {INDEX}", "missing ['ghost']")
    (tmp_path / shard).unlink()
    refuses(tmp_path, shard, "no such file")
    (tmp_path / INDEX).write_text('{"weight_map": 3}')
    refuses(tmp_path, f"{INDEX}: weight_map: expected an object")


def test_errors_name_the_file_of_the_tensor(tmp_path: Path) -> None:
    write(tmp_path, "sharded")
    shard = json.loads((tmp_path / INDEX).read_text())["weight_map"]["norm.weight"]
    wrong = TENSORS | {"norm.weight": torch.zeros(31)}
    write_weights(
        tmp_path, {name.replace("layers.0.", "midlayer."): t for name, t in wrong.items()}, "sharded"
    )
    refuses(tmp_path, f"{tmp_path / shard}: norm.weight: expected [32], found [31]")


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"fc.weight": TENSORS["fc.weight"]}, tmp_path / "b.safetensors")
    refuses(tmp_path, "b.safetensors: tensor fc.weight is also in", "a.safetensors")
