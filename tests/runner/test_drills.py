"""What breaks while an engine serves (60 s). The table of docs/serving.md names these tests."""

import logging

import pytest
import torch
from engines import draft_model, running, speculative, token_ids
from random_llama import write_draft, write_target
from vllm import SamplingParams

from vllm_eagle3.runner import chain, draft_scheduler

GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
PROMPTS = [[(31 * i + 7 * j) % 512 for j in range(20 + 9 * i)] for i in range(4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    return write_target(folder / "target"), write_draft(folder / "draft")


@pytest.fixture(scope="module")
def expected(models):
    with running(models[0]) as llm:
        return token_ids(llm, PROMPTS, GREEDY)


def test_a_draft_that_turns_to_nan(engine, models, expected, tmp_path, monkeypatch, caplog):
    """The text stays the target's, one warning comes, and policy auto hardly drafts any more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("WATCHED_DRAFTS", "WATCHED_VERIFICATIONS"):  # the policy may soon stop drafting by itself
        monkeypatch.setattr(draft_scheduler, name, 20)
    options = {"eagle3": {"policy": "auto"}}
    llm = engine(models[0], speculative_config=speculative(models[1], 3), additional_config=options)
    core = llm.llm_engine.engine_core.engine_core
    for name, weight in draft_model(llm).named_parameters():
        if "embed_tokens" not in name:  # the target's
            weight.data.fill_(torch.nan)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, "vllm.eagle3"):
        for _ in range(20):
            assert token_ids(llm, PROMPTS, GREEDY) == expected
            llm.reset_prefix_cache()
            if core.scheduler.draft_is_useless:
                break
    found = {record.getMessage() for record in caplog.records if record.name == "vllm.eagle3"}
    assert core.scheduler.draft_is_useless and len(found) == 1 and "were accepted" in found.pop()


def test_a_cache_that_is_too_small(engine, models, expected, monkeypatch):
    """Requests are preempted and computed again; the text does not change."""
    monkeypatch.setattr(chain, "MIN_CHAIN_PROBABILITY", 0.0)
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], 3),
        block_size=32,  # the smallest that both runners have on a CPU
        num_gpu_blocks_override=10,  # the longest request alone needs 4
        enable_prefix_caching=False,
    )
    assert token_ids(llm, PROMPTS, GREEDY) == expected
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert found["vllm:num_preemptions"] > 0


def test_requests_that_are_aborted(engine, models, expected):
    """Half of the requests end in the middle; the others are answered as ever, and nothing is left over."""
    llm = engine(models[0], speculative_config=speculative(models[1], 3), max_num_seqs=8)
    core = llm.llm_engine
    for i, prompt in enumerate([*PROMPTS, *PROMPTS]):
        core.add_request(str(i), {"prompt_token_ids": prompt}, GREEDY)
    answers: dict[int, list[int]] = {}
    for step in range(400):
        if step == 10:
            core.abort_request([str(i) for i in range(4, 8)])
        for output in core.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        if not core.has_unfinished_requests():
            break
    assert [answers[i] for i in range(4)] == expected and set(answers) == {0, 1, 2, 3}
    core.step()
    scheduler = core.engine_core.engine_core.scheduler
    assert not scheduler.requests and not scheduler.running
