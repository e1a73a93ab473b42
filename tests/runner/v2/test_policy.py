"""Policy `auto` on the V2 runner: chains and trees of changing sizes, also of size 0, change no token (40 s)."""

import itertools

import pytest
from closed_form import greedy_text, write_draft
from engines import speculative, token_ids
from vllm import SamplingParams

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.runner.policy_scheduler import PolicyMixin

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
PROMPTS = [[3, 9, 27 + 7 * i] for i in range(4)]


def policy_of(llm):
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert isinstance(scheduler, PolicyMixin)
    return scheduler.draft_policy


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A cost cache for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("tree", "sizes", "turns"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 0, 2, 0, 0, 4, 2, 8, 4, 8]),
        (
            {"depth": 5, "topk": 4, "nodes": 16},
            [0, 1, 2, 3, 4, 5, 8, 12, 16],
            [16, 0, 3, 12, 1, 8, 5, 0, 16],
        ),
    ],
)
def test_every_size_after_every_other(engine, closed_form_target, tmp_path, tree, sizes, turns):
    draft = write_draft(tmp_path / "draft", second_best=0.5)
    options = {"policy": "auto"} | ({"tree": tree} if tree else {})
    llm = engine(
        closed_form_target,
        speculative_config=speculative(draft, sizes[-1]),
        additional_config={"eagle3": options},
    )
    policy = policy_of(llm)
    assert [shape.nodes for shape in policy.shapes] == sizes
    turn = itertools.cycle(turns)
    asked = []
    policy.choose = lambda batch, context: asked.append(next(turn)) or policy.by_nodes[asked[-1]]
    assert token_ids(llm, PROMPTS, GREEDY) == [greedy_text(p[-1], 24) for p in PROMPTS]
    assert set(asked) == set(turns)


def test_left_to_itself_it_switches_a_useless_draft_off(engine, closed_form_target, tmp_path):
    assert Eagle3Options().policy == "auto"
    draft = write_draft(tmp_path / "wrong", wrong_every=1)
    llm = engine(
        closed_form_target,
        speculative_config=speculative(draft, 8),
        additional_config={"eagle3": {"policy": "auto", "tree": {"depth": 4, "topk": 1, "nodes": 4}}},
    )
    policy = policy_of(llm)
    for _ in range(6):
        assert token_ids(llm, PROMPTS, GREEDY) == [greedy_text(p[-1], 24) for p in PROMPTS]
    assert policy.best(len(PROMPTS)).nodes <= 1  # a draft costs this model hardly anything
