"""`vllm-eagle3 inspect`: the canonical form of each dialect, and the error for a broken draft (a few seconds)."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from dialects import DIALECTS, Dims, draft_tensors, target_config, write_dialect

from vllm_eagle3.checkpoint import add_parser, inspect
from vllm_eagle3.checkpoint.errors import CheckpointError

DIMS = Dims()


def command(*args: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["inspect", *map(str, args)])
    return parsed.func(parsed)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(target_config(DIMS)))
    return folder


@pytest.mark.parametrize("dialect", DIALECTS)
def test_text(tmp_path: Path, target: Path, dialect: str, capsys: pytest.CaptureFixture[str]) -> None:
    draft = write_dialect(tmp_path / "draft", dialect, draft_tensors(DIMS), DIMS, aux_layers=(3, 6, 11))
    assert command(draft, "--target", target) == 0
    shown = capsys.readouterr().out
    assert shown == inspect(draft, target)
    assert shown.startswith(f"{draft}: EAGLE-3 draft, {dialect} dialect, served by vllm-eagle3\n")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for line in (
        "aux_layers [3, 6, 11]",
        "draft_vocab_size 40",
        "norm_before_residual false",
        "fc.weight float32 [32, 96]",
        "layers.0.self_attn.k_proj.weight float32 [16, 64]",
        "d2t int64 [40]",
        "embed_tokens: missing, so the target's embedding",
    ):
        assert line in lines
    assert any(line.startswith("d2t: offsets") for line in lines)
    assert "midlayer" not in shown


def test_json(tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forms = []
    for dialect in DIALECTS:
        draft = write_dialect(tmp_path / dialect, dialect, draft_tensors(DIMS), DIMS, aux_layers=(3, 6, 11))
        assert command(draft, "--target", target, "--json") == 0
        forms.append(json.loads(capsys.readouterr().out))
    assert [form["config"].pop("dialect") for form in forms] == list(DIALECTS)
    assert all(form["config"] == forms[0]["config"] for form in forms)
    assert all(form["tensors"] == forms[0]["tensors"] for form in forms)
    assert forms[0]["tensors"]["lm_head.weight"] == {"shape": [40, 32], "dtype": "float32"}
    assert forms[0]["files"] == ["model.safetensors"]


def test_without_target_and_with_aux_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = write_dialect(tmp_path, "safeailab", draft_tensors(DIMS), DIMS)
    assert command(draft) == 0
    assert "unknown: name the target" in capsys.readouterr().out
    assert command(draft, "--aux-layers", 1, 5, 9) == 0
    assert "[1, 5, 9]" in capsys.readouterr().out


def test_broken_checkpoint(tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = draft_tensors(DIMS) | {"norm.weight": torch.zeros(31)}
    draft = write_dialect(tmp_path / "draft", "speculators", tensors, DIMS)
    expected = f"{draft / 'model.safetensors'}: norm.weight: expected [32], found [31]"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        command(draft, "--target", target)
    assert capsys.readouterr().out == ""


def test_draft_that_stock_vllm_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = write_dialect(tmp_path, "modelopt", {"x": torch.zeros(1)}, DIMS, config={"num_hidden_layers": 2})
    assert command(draft) == 0
    shown = capsys.readouterr().out
    assert "served by stock vLLM" in shown and "a draft of 2 layers" in shown and "tensors" not in shown
