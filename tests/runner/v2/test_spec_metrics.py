"""Statistics of trees with grafts on the V2 runner (30 s)."""

import pytest
from closed_form import greedy_text
from engines import speculative, token_ids
from vllm import SamplingParams


@pytest.mark.parametrize("graft", [False, True])
def test_shapes_and_paths(engine, closed_form_target, closed_form_draft, graft):
    """The prompts hold the answers, and the draft is wrong on multiples of 5: grafts are accepted further."""
    llm = engine(
        closed_form_target,
        speculative_config=speculative(closed_form_draft, 16),
        additional_config={"eagle3": {"tree": {"depth": 3, "topk": 3, "nodes": 9}, "graft": graft}},
    )
    params = SamplingParams(temperature=0, max_tokens=41, ignore_eos=True, detokenize=False)
    prompts = [[last, *greedy_text(last, 70), 2, last, *greedy_text(last, 2)] for last in (11, 300, 77)]
    assert token_ids(llm, prompts, params) == [greedy_text(last, 43)[2:] for last in (11, 300, 77)]
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:eagle3_") and not metric.name.endswith("seconds"):
            (label,) = set(metric.labels) - {"model_name", "engine"}
            found.setdefault(metric.name.removeprefix("vllm:eagle3_"), {})[metric.labels[label]] = (
                metric.value
            )
        elif hasattr(metric, "value"):
            found[metric.name] = metric.value
    assert set(found["steps"]) == {"tree of 16"}
    assert sum(found["accepted_paths"].values()) == found["vllm:spec_decode_num_drafts"]
    assert sum(found["drafted_tokens"].values()) == found["vllm:spec_decode_num_draft_tokens"]
    assert ("graft_tokens" in found) is graft
