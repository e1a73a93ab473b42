"""The drafts and slots that a tree's size makes vLLM reserve, and the log line about them (20 s)."""

import logging

import pytest
from closed_form import greedy_text, write_draft
from engines import token_ids
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs


def given(target, draft, options, **speculative):
    args = EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        max_model_len=256,
        speculative_config={"method": "eagle3", "model": str(draft), **speculative},
        additional_config={"eagle3": options},
    )
    args.create_engine_config()
    return args.create_engine_config()  # the arguments may be used more than once


def test_nodes_are_the_drafts_when_nothing_else_is_said(closed_form_target, tmp_path):
    draft = write_draft(tmp_path / "draft")
    tree = {"tree": {"depth": 3, "topk": 2, "nodes": 5}}
    assert given(closed_form_target, draft, tree).speculative_config.num_speculative_tokens == 5
    more = given(closed_form_target, draft, tree, num_speculative_tokens=9)
    assert more.speculative_config.num_speculative_tokens == 9
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        given(closed_form_target, draft, {})


def test_the_log_says_what_a_tree_reserves(engine, closed_form_target, tmp_path, caplog):
    draft = write_draft(tmp_path / "draft")
    with caplog.at_level(logging.INFO, "vllm.eagle3"):
        logging.getLogger("vllm").propagate = True
        llm = engine(
            closed_form_target,
            max_num_batched_tokens=64,
            speculative_config={"method": "eagle3", "model": str(draft)},
            additional_config={"eagle3": {"tree": {"depth": 3, "topk": 2, "nodes": 5}}},
        )
    line = next(r.getMessage() for r in caplog.records if "slots are kept" in r.getMessage())
    assert "5 nodes; 6 slots" in line and "at most 10 requests" in line
    prompt = [3, 9, 27, 81]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    text = token_ids(llm, [prompt], params)
    assert text == [greedy_text(prompt[-1], 12)]
