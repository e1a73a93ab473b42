"""`eagle3_max_draft_tokens` on the V2 runner: chains and trees, with and without asynchronous scheduling (60 s)."""

import pytest
from engines import asynchronous, speculative
from request_limits import assert_limits_are_kept

from vllm_eagle3.runner import chain

TREE = {"tree": {"depth": 3, "topk": 2, "nodes": 5}}


@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 3), (TREE, 5), ({"policy": "auto"} | TREE, 5), ({"graft": True} | TREE, 7)],
    ids=["chain", "tree", "auto", "graft"],
)
def test_it_is_kept(engine, models, tmp_path, monkeypatch, options, most, overlap):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chain, "MIN_CHAIN_PROBABILITY", 0.0)
    if overlap:
        asynchronous(monkeypatch)
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], most),
        additional_config={"eagle3": options},
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    assert_limits_are_kept(llm, most)
