"""SmolLM2 in fp32 with trees from the shipped head: the target's own text (60 s; all prompts: minutes)."""

import json
from pathlib import Path

import pytest
from engines import running, speculative
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_eagle3.evaluation.pair import default_pair

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
SETTINGS = {
    "skip_tokenizer_init": False,
    "max_model_len": 1024,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
}


def answers(llm, turns, params):
    chats = [[{"role": "user", "content": turn}] for turn in turns]
    return [list(output.outputs[0].token_ids) for output in llm.chat(chats, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def turns():
    return [json.loads(line)["turns"][0] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def same_with_trees(turns, params, depth, topk, nodes):
    """Asserts identical answers; returns tokens per verification."""
    target, draft = default_pair()
    with running(target, **SETTINGS) as llm:
        plain = answers(llm, turns, params)
    options = {"eagle3": {"tree": {"depth": depth, "topk": topk, "nodes": nodes}}}
    with running(
        target, speculative_config=speculative(draft, nodes), additional_config=options, **SETTINGS
    ) as llm:
        assert answers(llm, turns, params) == plain
        found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts, accepted = (found[f"vllm:spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens"))
    return 1 + accepted / drafts


def test_text_and_a_grammar_in_one_batch(turns):
    """The request with a grammar gets chains, the others trees."""
    greedy = SamplingParams(temperature=0, max_tokens=16)
    digits = SamplingParams(
        temperature=0, max_tokens=16, structured_outputs=StructuredOutputsParams(regex="[0-9 ]+")
    )
    assert same_with_trees(turns[:3], [greedy, digits, greedy], 4, 4, 12) > 1.3


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_prompts(turns, temperature):
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=64) for i in range(len(turns))]
    assert same_with_trees(turns, params, 6, 10, 60) > 1.5
