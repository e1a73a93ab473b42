"""Broken drafts of every kind seen so far are refused in one line that names the file and the error (seconds).

`docs/serving.md` shows the table `broken_drafts()`; a test holds the two together.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from dialects import Dims, draft_tensors, target_config, write_dialect, write_weights
from safetensors.torch import load_file, save_file

from vllm_eagle3.checkpoint import CheckpointError, check_draft, refuse_unreadable

DIMS = Dims()
FC = "fc.weight"


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def as_bin(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return tensors


def compressed(folder: Path) -> None:
    """A zip bomb: 64 MB of zeros in a few kilobytes, as a .bin that torch would unpack."""
    torch.save(as_bin(folder) | {FC: torch.zeros(16 << 20)}, folder / "raw.bin")
    with ZipFile(folder / "raw.bin") as raw, ZipFile(folder / "pytorch_model.bin", "w", ZIP_DEFLATED) as out:
        for part in raw.infolist():
            out.writestr(part.filename, raw.read(part), compress_type=ZIP_DEFLATED)
    (folder / "raw.bin").unlink()
    assert (folder / "pytorch_model.bin").stat().st_size < 1 << 20


def not_a_state_dict(folder: Path) -> None:
    as_bin(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")


def a_target(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=30)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2)}, folder / "model.safetensors")


def without_shard(folder: Path) -> None:
    tensors = as_bin(folder)
    write_weights(folder, tensors, "sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()


def circle(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "1234")


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


# Long: a table.
def broken_drafts() -> dict[str, tuple[Callable[[Path], Any], str, str]]:
    """By error: how to break a good draft, the file that the message names, and the rest of the message."""
    weights = "model.safetensors"
    nan, inf = torch.nan, torch.inf
    fp8 = torch.float8_e4m3fn
    return {
        "the file is cut off": (truncate, weights, "not a readable safetensors file"),
        "a NaN among the weights": (
            edit(FC, lambda w: w.index_fill(0, torch.tensor([3]), nan)),
            weights,
            "fc.weight: expected finite weights, found NaN or infinity",
        ),
        "one infinite weight": (
            edit(FC, lambda w: w.index_fill(1, torch.tensor([9]), inf)),
            weights,
            "fc.weight: expected finite weights, found NaN or infinity",
        ),
        "integer weights": (
            edit(FC, lambda w: (w * 100).to(torch.int32)),
            weights,
            "fc.weight: expected floating-point weights, found torch.int32",
        ),
        "fp8 weights without a scale": (
            edit(FC, lambda w: w.to(fp8)),
            weights,
            "fc.weight: fp8 weights need scales, but config.json has no quantization_config",
        ),
        "fc of another width": (
            edit(FC, lambda w: w[:, :-32]),
            weights,
            "fc.weight: expected [32, 96], found [32, 64]",
        ),
        "a layer count that the tensors contradict": (
            lambda folder: edit_config(folder, num_hidden_layers=2),
            "",
            "config.json says num_hidden_layers is 2, but there are tensors of 1",
        ),
        "the target given as the draft": (a_target, "", "found a language model of 30 layers"),
        "an absurd size": (
            lambda folder: edit_config(folder, intermediate_size=10**9),
            weights,
            "midlayer.mlp.down_proj.weight: expected [32, 1000000000], found [32, 48]",
        ),
        "a size beyond all sizes": (
            lambda folder: edit_config(folder, max_position_embeddings=10**13),
            "config.json",
            "max_position_embeddings: expected at most",
        ),
        "made for another target": (
            lambda folder: edit_config(folder, vocab_size=97),
            "config.json",
            "made for another target: vocab_size says the target's vocabulary is 97, but this target's is 96",
        ),
        "a layer beyond the target's": (
            lambda folder: edit_config(folder, eagle_aux_hidden_state_layer_ids=[1, 2, 99]),
            "config.json",
            "expected strictly increasing ids within 0..12 (the target's layers), found [1, 2, 99]",
        ),
        "a zip bomb as .bin": (
            compressed,
            "pytorch_model.bin",
            "expected tensors as torch stores them, uncompressed",
        ),
        "a pickle that runs code": (
            not_a_state_dict,
            "pytorch_model.bin",
            "expected a state dict of plain tensors (read with weights_only=True)",
        ),
        "a missing shard": (without_shard, "model-00002-of-00002.safetensors", "no such file"),
        "config.json is a link to itself": (circle, "config.json", "cannot be read: Too many levels"),
        "the weights are a link to nothing": (
            dangling,
            weights,
            "no such file (model.safetensors is a link to what does not exist)",
        ),
        "config.json is a pipe": (pipe, "config.json", "expected a file, found something else"),
        "config.json is no JSON": (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json",
            "not valid JSON",
        ),
        "no such folder": (
            lambda folder: folder.rename(folder.with_name("elsewhere")),
            "config.json",
            "no such file; expected the directory of a checkpoint",
        ),
    }


@pytest.mark.parametrize("what", broken_drafts())
def test_it_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "draft"
    write_dialect(folder, "safeailab", draft_tensors(DIMS), DIMS, aux_layers=(3, 6, 11))
    check_draft(folder, target_config(DIMS))
    change, file, text = broken_drafts()[what]
    change(folder)
    with pytest.raises(CheckpointError) as error:
        check_draft(folder, target_config(DIMS))
    message = str(error.value)
    assert str(folder / file) in message and text in message
    assert "\n" not in message and len(message) < 700


def test_a_loaders_error_gets_the_name_of_the_file(tmp_path: Path) -> None:
    write_dialect(tmp_path, "specforge", draft_tensors(DIMS), DIMS, files="sharded")
    error = RuntimeError("incomplete metadata")
    with pytest.raises(CheckpointError, match="the weights cannot be loaded: incomplete metadata"):
        refuse_unreadable(tmp_path, error)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: not a readable"):
        refuse_unreadable(tmp_path, error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    write_dialect(tmp_path, "specforge", draft_tensors(DIMS), DIMS)
    (tmp_path / "config.json").chmod(0)
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read: Permission denied"):
        check_draft(tmp_path)
