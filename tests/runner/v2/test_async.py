"""Asynchronous scheduling, a GPU's default, which vLLM switches off on a CPU: switched on again here (40 s)."""

import random

import pytest
from engines import running, speculative, token_ids
from vllm import SamplingParams
from vllm.platforms import current_platform

SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256}
TREE = {"tree": {"depth": 4, "topk": 3, "nodes": 10}}


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(3)
    return [[rng.randrange(512) for _ in range(n)] for n in (5, 90, 20, 61, 8, 130)]


@pytest.fixture(scope="module")
def expected(models, prompts):
    with running(models[0], **SIZES) as llm:
        return token_ids(llm, prompts, params())


def params():
    """Answers of several lengths, so that requests end and begin while others are under way."""
    return [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in (24, 9, 30, 14, 20, 26)
    ]


@pytest.mark.parametrize(
    "options", [{}, {"policy": "auto"}, TREE, TREE | {"policy": "auto"}],
    ids=["chain", "chain-auto", "tree", "tree-auto"],
)  # fmt: skip
def test_same_text(engine, models, prompts, expected, monkeypatch, options):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    platform = type(current_platform)
    original = platform.check_and_update_config

    def check_and_update_config(vllm_config):
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(check_and_update_config))
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], 10 if "tree" in options else 3),
        additional_config={"eagle3": options},
        **SIZES,
    )
    core = llm.llm_engine.engine_core.engine_core
    assert isinstance(core.scheduler, AsyncScheduler)
    assert core.batch_queue is not None
    assert token_ids(llm, prompts, params()) == expected
    found = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    assert found["vllm:spec_decode_num_drafts"] > 20
