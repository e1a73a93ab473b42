"""A widened target computes the same as the original (3 s)."""

import json

import pytest
import torch
from random_llama import write_target
from transformers import AutoModelForCausalLM

from vllm_eagle3.evaluation import widen


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(60).view(2, 30) * 7 % 512
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    return found.logits, found.hidden_states[2]


def test_same_logits_and_states(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(widen, "cache_folder", lambda: tmp_path / "cache")
    target = write_target(tmp_path / "target")
    (target / "tokenizer.json").write_text("{}")
    wide = widen.widened(target, 3)
    assert wide.name == "target-widened-3x" and "WIDENED TARGET" in capsys.readouterr().err
    sizes = [json.loads((path / "config.json").read_text())["intermediate_size"] for path in (target, wide)]
    assert sizes[1] == 3 * sizes[0]
    assert (wide / "tokenizer.json").is_file()
    for left, right in zip(logits(target), logits(wide), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)
    before = (wide / "config.json").stat().st_mtime_ns
    assert widen.widened(target, 3) == wide and (wide / "config.json").stat().st_mtime_ns == before


def test_the_added_neurons_work(tmp_path):
    """The added neurons cost as much as others: they are not zero. Only the weights that read them are zero."""
    gate, down = torch.randn(4, 3), torch.randn(3, 4)
    wide = widen.widen("x.mlp.gate_proj.weight", gate, 2)
    assert wide.shape == (8, 3) and bool((wide[4:] != 0).any(dim=1).all())
    narrow = widen.widen("x.mlp.down_proj.weight", down, 2)
    assert torch.equal(narrow[:, :4], down) and not narrow[:, 4:].any()


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="at least 2, found 1"):
        widen.widened(tmp_path, 1)
    with pytest.raises(ValueError, match="config.json"):
        widen.widened(tmp_path / "none", 2)
