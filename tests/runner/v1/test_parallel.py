"""Tensor parallelism of two on a CPU gives the closed-form text, in separate worker processes (60 s)."""

from closed_form import greedy_text
from engines import speculative, token_ids
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)


def test_two_ranks(engine, closed_form_target, closed_form_draft, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    llm = engine(
        closed_form_target, speculative_config=speculative(closed_form_draft, 3), tensor_parallel_size=2
    )
    prompts = [[3, 9, 27 + i] for i in range(3)]
    assert token_ids(llm, prompts, GREEDY) == [greedy_text(p[-1], 16) for p in prompts]
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert found["vllm:spec_decode_num_accepted_tokens"] > 20
