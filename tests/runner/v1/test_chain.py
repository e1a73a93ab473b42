"""Chains on the V1 runner, on the closed-form pair: text and acceptance are known exactly (90 s)."""

import pytest
from closed_form import VOCAB, expected_accepted, greedy_text
from engines import speculative, token_ids
from sampled_text import CRITICAL, statistic
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)


def proposer(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter


def metrics(llm):
    return {m.name: getattr(m, "value", None) for m in llm.get_metrics()}


@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (3, 4), (16, 2)])
def test_text_is_the_targets(engine, closed_form_target, closed_form_draft, tokens, batch):
    llm = engine(closed_form_target, speculative_config=speculative(closed_form_draft, tokens))
    assert (
        type(proposer(llm)).__module__ == "vllm_eagle3.runner.v1.proposer"
        and proposer(llm).draft_config is not None
    )
    prompts = [[3, 9, 27 + i] for i in range(batch)]
    assert token_ids(llm, prompts, GREEDY) == [greedy_text(p[-1], 16) for p in prompts]


def test_acceptance_is_as_predicted(engine, closed_form_target, closed_form_draft):
    llm = engine(closed_form_target, speculative_config=speculative(closed_form_draft, 3))
    token_ids(llm, [[3, 9, 27]], GREEDY)
    text = [27, *greedy_text(27, 16)]
    done, steps, accepted = 1, 0, 0
    while done < 16:
        step = expected_accepted(text[done], 3, 5)  # also past the last token
        done, steps, accepted = done + step + 1, steps + 1, accepted + step
    found = metrics(llm)
    assert found["vllm:spec_decode_num_accepted_tokens"] == accepted
    assert found["vllm:spec_decode_num_drafts"] == steps


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_k_by_batch_size(engine, closed_form_target, closed_form_draft, batch):
    table = [[1, 2, 4], [3, 4, 2], [5, 8, 0]]
    config = speculative(closed_form_draft, 4, num_speculative_tokens_per_batch_size=table)
    llm = engine(closed_form_target, speculative_config=config)
    prompts = [[3, 9, 27 + i] for i in range(batch)]
    assert token_ids(llm, prompts, GREEDY) == [greedy_text(p[-1], 16) for p in prompts]


def test_chunked_prefill_and_prefix_cache(engine, closed_form_target, closed_form_draft):
    llm = engine(
        closed_form_target,
        speculative_config=speculative(closed_form_draft, 3),
        max_num_batched_tokens=32,
        max_num_seqs=4,
    )
    prompts = [[(7 * i + j) % VOCAB for j in range(90 + i)] for i in range(4)]
    for _ in range(2):
        assert token_ids(llm, prompts, GREEDY) == [greedy_text(p[-1], 16) for p in prompts]


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_text_follows_the_target(engine, tmp_path, method):
    """With upstream's bug 55005 (on a CPU) this test would fail."""
    squared, accepted = statistic(engine, tmp_path, 256, draft_sample_method=method)
    assert accepted > 100 and squared < CRITICAL
