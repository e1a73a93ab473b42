"""Every sampling parameter in every kind of step on the V1 runner (60 s)."""

import pytest
from engines import running, speculative
from random_llama import write_draft, write_target
from sampling_matrix import PARAMETERS, SIZES, STEPS, V2_ONLY, answers, obeys, steps_of

from vllm_eagle3.runner import chain

ASKED = {name: asked for name, asked in PARAMETERS.items() if name not in V2_ONLY}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    return write_target(folder / "target"), write_draft(folder / "draft")


@pytest.fixture(scope="module")
def greedy(models):
    """Answers at temperature 0 of the engine that does not speculate."""
    with running(models[0], **SIZES) as llm:
        return {
            (name, kind): answers(llm, asked, kind, 0.0) for name, asked in ASKED.items() for kind in STEPS
        }


@pytest.fixture(scope="module")
def llm(models, greedy, tmp_path_factory):
    """The engine that speculates. It starts after `greedy` has ended, because two engines do not fit in a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(chain, "MIN_CHAIN_PROBABILITY", 0.0)  # the random draft trusts none of its drafts
        options = {"eagle3": {"policy": "auto"}}
        config = speculative(models[1], 3)
        with running(models[0], speculative_config=config, additional_config=options, **SIZES) as llm:
            yield llm


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", ASKED)
def test_it_is_answered(llm, greedy, name, kind):
    asked, expected, tokens = ASKED[name], greedy[name, kind], STEPS[kind][1]
    with steps_of(llm, kind) as seen:
        assert answers(llm, asked, kind, 0.0) == expected
        sampled = answers(llm, asked, kind, 1.0)
    llm.reset_prefix_cache()
    assert kind in seen or "stop_token_ids" in asked, seen
    for found, best in zip(sampled, expected, strict=True):
        assert len(found) == asked.get("n", 1)
        assert all(obeys(asked, ids, tokens, best[0]) for ids in found), found
