"""Our chain on Model Runner V2 (interpreted): text, acceptance, sampled text with seeds (60 s)."""

import pytest
from closed_form import expected_accepted, greedy_text, write_draft, write_target
from engines import speculative, token_ids
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)


def speculator(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.speculator


@pytest.mark.parametrize(("tokens", "batch"), [(1, 2), (3, 4), (16, 1)])
def test_text_is_the_targets(engine, closed_form_target, closed_form_draft, tokens, batch):
    llm = engine(closed_form_target, speculative_config=speculative(closed_form_draft, tokens))
    assert type(speculator(llm)).__module__ == "vllm_eagle3.runner.v2"
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
def test_sampled_text_with_seeds(engine, tmp_path, method):
    """Greedy drafts: the target's noise is keyed by (seed, position), so the text is plain sampling's, token by
    token. Probabilistic drafts follow the distribution only; here: that they run and are accepted."""
    target, draft = write_target(tmp_path / "target", 8.0), write_draft(tmp_path / "draft", scale=8.0)
    prompts = [[3, 9, 27 + i] for i in range(4)]
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=16, ignore_eos=True, detokenize=False) for i in range(4)
    ]
    plain = token_ids(engine(target), prompts, params)
    llm = engine(target, speculative_config=speculative(draft, 3, draft_sample_method=method))
    found = token_ids(llm, prompts, params)
    if method == "greedy":
        assert found == plain
    assert {m.name: getattr(m, "value", None) for m in llm.get_metrics()}["vllm:spec_decode_num_accepted_tokens"] > 0
