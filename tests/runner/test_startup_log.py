"""The log lines at start-up about a tree's memory (under a second)."""

import logging
from types import SimpleNamespace

import pytest
import torch

from vllm_eagle3.config import TreeOptions
from vllm_eagle3.runner.startup_log import grammar_bitmask_bytes, report_lookahead, scratch_bytes

TREE = TreeOptions(depth=6, topk=10, nodes=60)


@pytest.fixture
def config() -> SimpleNamespace:
    """Llama 3.1 8B at the default limits of an H100."""
    model = SimpleNamespace(
        dtype=torch.bfloat16,
        get_vocab_size=lambda: 128256,
        get_num_kv_heads=lambda parallel: 8,
        get_head_size=lambda: 128,
        get_num_layers=lambda parallel: 32,
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        scheduler_config=SimpleNamespace(max_num_seqs=1024, max_num_batched_tokens=16384),
        speculative_config=SimpleNamespace(num_speculative_tokens=60, draft_model_config=model),
    )


def test_memory_at_the_default_limits(config):
    assert grammar_bitmask_bytes(config) == 1024 * 61 * 4008 * 4  # 1.0 GB
    assert scratch_bytes(config, TREE) == 1024 * 50 * 2 * 8 * 128 * 2  # 0.2 GB


def test_the_log_line_names_both(config, caplog):
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO, "vllm.eagle3"):
        report_lookahead(config, TREE)
    assert "grammar bitmask takes 1001.4 MB" in caplog.text
    assert "scratch keys of the draft 209.7 MB" in caplog.text
    assert "at most 268 requests decode at a time" in caplog.text
