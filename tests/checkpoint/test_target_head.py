"""Rows of the target's head, for drafts without a head of their own."""

import pytest
import torch
from safetensors.torch import save_file

from vllm_eagle3.checkpoint import CheckpointError
from vllm_eagle3.checkpoint.target_head import target_head_rows

IDS = torch.tensor([0, 3, 4])


def test_head_before_embedding_wherever_they_are(tmp_path):
    embedding, head = torch.randn(5, 2), torch.randn(5, 2)
    save_file({"model.embed_tokens.weight": embedding}, tmp_path / "model-00001-of-00002.safetensors")
    assert torch.equal(target_head_rows(str(tmp_path), IDS), embedding[IDS])
    save_file({"language_model.lm_head.weight": head}, tmp_path / "model-00002-of-00002.safetensors")
    assert torch.equal(target_head_rows(str(tmp_path), IDS), head[IDS])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="expected lm_head.weight or embed_tokens.weight"):
        target_head_rows(str(tmp_path), IDS)
    with pytest.raises(CheckpointError, match="no/such-model: .* not in the local cache"):
        target_head_rows("no/such-model", IDS)
