"""Chains on Model Runner V2, interpreted: text, acceptance, sampled text (60 s)."""

import pytest
from closed_form import expected_accepted, greedy_text
from engines import speculative, token_ids
from sampled_text import CRITICAL, statistic
from vllm import SamplingParams
from vllm.triton_utils import HAS_TRITON

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)


def speculator(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.speculator


@pytest.mark.parametrize(("tokens", "batch"), [(1, 2), (3, 4), (16, 1)])
def test_text_is_the_targets(engine, closed_form_target, closed_form_draft, tokens, batch):
    llm = engine(closed_form_target, speculative_config=speculative(closed_form_draft, tokens))
    module = "speculator" if HAS_TRITON else "cpu_speculator"
    assert type(speculator(llm)).__module__ == f"vllm_eagle3.runner.v2.{module}"
    prompts = [[3, 9, 27 + i] for i in range(batch)]
    assert token_ids(llm, prompts, GREEDY) == [greedy_text(p[-1], 16) for p in prompts]
    if tokens == 3:
        found = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        accepted = 0
        for prompt in prompts:
            text, done = [prompt[-1], *greedy_text(prompt[-1], 16)], 1
            while done < 16:
                step = expected_accepted(text[done], 3, 5)  # also past the last token
                done, accepted = done + step + 1, accepted + step
        assert found["vllm:spec_decode_num_accepted_tokens"] == accepted


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_text_follows_the_target(engine, tmp_path, method):
    squared, accepted = statistic(engine, tmp_path, 128, draft_sample_method=method)
    assert accepted > 50 and squared < CRITICAL
