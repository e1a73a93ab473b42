"""Asynchronous scheduling: the default on a GPU, off on a CPU, and switched on here (60 s)."""

import random

import pytest
from draining import assert_every_number_of_requests_drains
from engines import asynchronous, running, speculative, token_ids
from vllm import SamplingParams

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
    """Answers of several lengths, so that requests begin and end while others run."""
    return [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in (24, 9, 30, 14, 20, 26)
    ]


@pytest.mark.parametrize(
    "options", [{}, {"policy": "auto"}, TREE, TREE | {"policy": "auto"}],
    ids=["chain", "chain-auto", "tree", "tree-auto"],
)  # fmt: skip
def test_same_text(engine, models, prompts, expected, monkeypatch, options):
    asynchronous(monkeypatch)
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], 10 if "tree" in options else 3),
        additional_config={"eagle3": options},
        **SIZES,
    )
    assert llm.llm_engine.engine_core.engine_core.batch_queue is not None
    assert token_ids(llm, prompts, params()) == expected
    found = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    assert found["vllm:spec_decode_num_drafts"] > 20


@pytest.mark.parametrize("options", [{}, TREE], ids=["chain", "tree"])
def test_draining(engine, models, monkeypatch, options):
    asynchronous(monkeypatch)
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], 10 if options else 3),
        additional_config={"eagle3": options | {"policy": "auto"}},
        **SIZES,
    )
    assert_every_number_of_requests_drains(llm)
