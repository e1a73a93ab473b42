"""`eagle3_max_draft_tokens`: a request's own limit of drafts (60 s)."""

import pytest
from engines import asynchronous, speculative
from random_llama import write_draft, write_target
from request_limits import assert_limits_are_kept
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_eagle3.runner import chain
from vllm_eagle3.runner.request_limit import LIMIT, check_limit


@pytest.mark.parametrize("limit", [-1, 4, 2.0, "2", True, [1], {}])
def test_what_is_no_limit_is_refused(limit):
    with pytest.raises(VLLMValidationError, match=rf"{LIMIT}: expected an integer from 0 .* to 3 .*found"):
        check_limit(SamplingParams(extra_args={LIMIT: limit}), 3)


@pytest.mark.parametrize("limit", [None, 0, 3])
def test_what_is_a_limit_is_not(limit):
    check_limit(SamplingParams(extra_args=None if limit is None else {LIMIT: limit, "other": 1}), 3)
    check_limit(object(), 3)  # of a pooling request


@pytest.mark.parametrize("policy", ["fixed", "auto"])
@pytest.mark.parametrize("overlap", [False, True])
def test_it_is_kept(engine, tmp_path, monkeypatch, policy, overlap):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chain, "MIN_CHAIN_PROBABILITY", 0.0)
    if overlap:
        asynchronous(monkeypatch)
    target, draft = write_target(tmp_path / "target"), write_draft(tmp_path / "draft")
    llm = engine(
        target,
        speculative_config=speculative(draft, 3),
        additional_config={"eagle3": {"policy": policy}},
        max_num_batched_tokens=64,
    )
    assert_limits_are_kept(llm, 3)
