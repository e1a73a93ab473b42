"""Exported drafts: both forms, read back by vllm_eagle3.checkpoint (3 s)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vllm_eagle3.checkpoint import CheckpointError, read_checkpoint
from vllm_eagle3.reference.draft import DraftModel, load_draft
from vllm_eagle3.training.data import load_documents, make_batch
from vllm_eagle3.training.export import export
from vllm_eagle3.training.features import Target
from vllm_eagle3.training.initialize import new_draft, warm_start

OPTIONS = [
    {},
    {"norm_before_residual": True},
    {"fc_norm": True, "norm_output": True},
    {"input_norm": True},
    {"qk_norm": True},
]


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> Target:
    return Target(tiny_target, dtype=torch.float32)


def draft(target: Target, rows: Path, options: dict[str, bool], init: str = "random") -> DraftModel:
    sample = make_batch(load_documents([rows], 96)[:4])
    return new_draft(target, torch.arange(10, 74), options, init, 0, sample).eval()


@pytest.mark.parametrize("form", ["flat", "speculators"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_round_trip(
    target: Target, tiny_rows: Path, tmp_path: Path, form: str, options: dict[str, bool]
) -> None:
    """Config and every tensor come back through the package's reader, and draft the same tokens."""
    model = draft(target, tiny_rows, options)
    export(model, tmp_path, form, torch.float32, verifier="tiny")
    again = load_draft(tmp_path, embeddings=target.embeddings)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    states = target.features(make_batch(load_documents([tiny_rows], 96)[:1])).aux
    ids = torch.arange(len(states[0])) + 5
    with torch.no_grad():
        both = [
            m.logits(m.layer(m.embed(ids), m.fuse(states), torch.arange(len(ids)))[0]) for m in (model, again)
        ]
    assert torch.equal(*both)


def test_flat_form(target: Target, tiny_rows: Path, tmp_path: Path) -> None:
    """Embeddings stay out, the layer is `midlayer`, aux ids name outputs of layers, d2t holds offsets."""
    export(draft(target, tiny_rows, {}), tmp_path)
    tensors, config = (
        load_file(tmp_path / "model.safetensors"),
        json.loads((tmp_path / "config.json").read_text()),
    )
    assert "embed_tokens.weight" not in tensors and "midlayer.self_attn.q_proj.weight" in tensors
    assert tensors["d2t"].dtype == torch.int64 and tensors["d2t"].tolist() == [10] * 64
    assert tensors["t2d"].nonzero()[:, 0].tolist() == list(range(10, 74))
    assert tensors["fc.weight"].dtype == torch.bfloat16
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["norm_before_residual"] is False
    assert tuple(read_checkpoint(tmp_path).config.aux_layers or ()) == target.aux_layers == (2, 3, 4)


def test_speculators_form(target: Target, tiny_rows: Path, tmp_path: Path) -> None:
    """Embeddings are shipped, aux ids name inputs of layers, norm_before_residual is written out."""
    export(draft(target, tiny_rows, {}), tmp_path, "speculators", verifier="org/tiny")
    tensors, config = (
        load_file(tmp_path / "model.safetensors"),
        json.loads((tmp_path / "config.json").read_text()),
    )
    assert "embed_tokens.weight" in tensors and "layers.0.self_attn.q_proj.weight" in tensors
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]
    assert config["norm_before_residual"] is False and config["draft_vocab_size"] == 64
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/tiny"
    assert config["transformer_layer_config"]["vocab_size"] == 96


def test_unknown_form(target: Target, tiny_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="form must be one of flat, speculators, found 'onnx'"):
        export(draft(target, tiny_rows, {}), tmp_path, "onnx")


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json"):
        load_draft(tmp_path)


@pytest.mark.parametrize("options", [{}, {"fc_norm": True}], ids=str)
def test_start_from_the_last_layer(target: Target, tiny_rows: Path, options: dict[str, bool]) -> None:
    """fc passes the high state on (up to a scale a row with fc_norm) and the layer is the target's last."""
    model = draft(target, tiny_rows, options, "target")
    states = target.features(make_batch(load_documents([tiny_rows], 96)[:2])).aux
    g = model.fuse(states)
    torch.testing.assert_close(
        g / g.norm(dim=-1, keepdim=True),
        states[-1] / states[-1].norm(dim=-1, keepdim=True),
        atol=1e-5,
        rtol=1e-4,
    )
    theirs = target.decoder.layers[-1].self_attn.v_proj.weight
    assert torch.equal(model.draft_layer.self_attn.v_proj.weight[:, 32:], theirs)
    assert not model.draft_layer.self_attn.v_proj.weight[:, :32].any()


def test_a_larger_vocabulary_keeps_the_rows_and_takes_the_targets(
    target: Target, tiny_rows: Path, tmp_path: Path
) -> None:
    """The most frequent tokens are added; what the draft said about the others is what it says still."""
    old = draft(target, tiny_rows, {"fc_norm": True})
    torch.nn.init.normal_(old.lm_head.weight)
    path = export(old, tmp_path / "old", dtype=torch.float32)
    counts = np.zeros(96, dtype=np.int64)
    counts[[1, 80, 90]] = [5, 9, 7]  # 1 is in the vocabulary already
    missing = [i for i in range(96) if i not in old.target_ids.tolist()]
    assert 80 in missing and 90 in missing
    new = warm_start(path, target, counts, 66)
    added = sorted(set(new.target_ids.tolist()) - set(old.target_ids.tolist()))
    assert added == [80, 90] and set(old.target_ids.tolist()) < set(new.target_ids.tolist())
    a, kept = torch.randn(3, 32), torch.isin(new.target_ids, old.target_ids)
    assert torch.equal(new.logits(a)[:, kept], old.logits(a))
    assert torch.equal(new.lm_head.weight[~kept], target.head.weight[[80, 90]])
    assert torch.equal(new.fc.weight, old.fc.weight) and torch.equal(
        new.embed(torch.arange(96)), target.embeddings
    )
    assert torch.equal(warm_start(path, target, counts, None).target_ids, old.target_ids)
    with pytest.raises(ValueError, match=r"draft_vocab_size: expected 64 .* to 96, found 50"):
        warm_start(path, target, counts, 50)


def test_a_draft_of_another_target_is_no_start(target: Target, tiny_rows: Path, tmp_path: Path) -> None:
    path = export(draft(target, tiny_rows, {}), tmp_path)
    other = Target(target.path, (1, 2, 3), torch.float32)
    with pytest.raises(
        ValueError, match=r"made for layers \(2, 3, 4\) and 96 tokens; this run has layers \(1, 2, 3\)"
    ):
        warm_start(path, other, np.zeros(96, dtype=np.int64), None)
