"""The memory that an engine reserves, and the message if it is not free (20 s: starts an engine on the real pair)."""

import json

import pytest

from vllm_eagle3.evaluation import worker
from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.evaluate import run_in_process
from vllm_eagle3.evaluation.settings import EvalSettings
from vllm_eagle3.runner import engine_memory
from vllm_eagle3.runner.engine_memory import (
    GB,
    FreeMemory,
    NotEnoughMemoryError,
    kv_cache_bytes,
    memory_arguments,
)

LLAMA = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
DRAFT = LLAMA | {"num_hidden_layers": 1}


@pytest.fixture
def node(monkeypatch):
    """`node(total, free)`: what the memory node reports, in GB, to vLLM and to this project."""
    from vllm.utils import cpu_resource_utils
    from vllm.v1.worker import cpu_worker

    def report(total: float, free: float) -> None:
        info = cpu_resource_utils.MemoryNodeInfo(int(total * GB), int(free * GB))
        for module in (cpu_resource_utils, cpu_worker):
            monkeypatch.setattr(module, "get_memory_node_info", lambda _: info)

    return report


def test_size_of_the_cache():
    """2 (keys, values) * 31 layers * 192 numbers * 2 bytes per token, in blocks of 128 tokens with two spare blocks."""
    token = 2 * 31 * 3 * 64 * 2
    assert kv_cache_bytes([LLAMA, DRAFT], 4, 1024, 2) == token * 128 * (4 * 8 + 2)
    assert kv_cache_bytes([LLAMA, DRAFT], 1, 1025, 4) == 2 * token * 128 * (9 + 2)
    wide = DRAFT | {"head_dim": 128}
    assert kv_cache_bytes([LLAMA, wide], 4, 1024, 2) == 2 * token * 128 * (4 * 8 + 2)


@pytest.fixture
def settings(tmp_path):
    target, draft = default_pair()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "source": "a", "turns": ["What is the capital of France?"]}))
    return EvalSettings(
        target=str(target),
        draft=str(draft),
        data=(str(prompts),),
        num_speculative_tokens=3,
        max_tokens=8,
        max_model_len=1024,
        batch_size=4,
        enforce_eager=True,
    )


def test_an_engine_starts_where_a_small_node_is_half_full(settings, node):
    """vLLM alone asks for 8.3 GB here and stops."""
    node(total=9, free=5)
    (run,) = worker.run_mode("chain", settings)
    assert "Paris" in run_text(run, settings)


def run_text(run, settings) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(settings.target).decode(run.answers["a"][0])


def test_the_message_names_need_and_free_and_what_to_change(settings, node):
    node(total=9, free=1)
    expected = (
        r"memory node \d+: this engine needs about 1\.9 GB \(weights 0\.3, KV cache 0\.1, working memory 1\.5\), "
        r"but 1\.0 of 9\.0 GB are free\. End other processes, or choose a smaller batch or length"
    )
    with pytest.raises(NotEnoughMemoryError, match=expected):
        next(worker.run_mode("chain", settings))


def test_the_message_comes_out_of_the_worker_process(settings, tmp_path):
    """No machine that runs these tests has memory for the KV cache of 100,000 requests."""
    from dataclasses import replace

    with pytest.raises(RuntimeError, match=r"^mode none: .*this engine needs about .* GB are free"):
        run_in_process("none", replace(settings, batch_size=100_000), tmp_path / "log")


def test_fewer_requests_may_have_to_fit(monkeypatch, closed_form_target):
    """When answers are generated, vLLM may let requests wait: the cache is the free memory, and one must fit."""
    monkeypatch.setattr(engine_memory, "free_memory", lambda: FreeMemory(2 * GB, 9 * GB, "node 0", "cpu"))
    ask = {"batch_size": 10**6, "max_model_len": 4096, "dtype": "float32"}
    with pytest.raises(NotEnoughMemoryError):
        memory_arguments(closed_form_target, None, **ask)
    reserved = memory_arguments(closed_form_target, None, least=1, **ask)["kv_cache_memory_bytes"]
    assert 0.4 * GB < reserved <= 0.5 * GB


def test_on_a_gpu_the_share_is_what_is_needed(monkeypatch, closed_form_target):
    monkeypatch.setattr(engine_memory, "free_memory", lambda: FreeMemory(70 * GB, 80 * GB, "GPU 0", "cuda"))
    given = memory_arguments(closed_form_target, None, batch_size=1, max_model_len=64)
    assert 4 / 80 < given["gpu_memory_utilization"] < 5 / 80
