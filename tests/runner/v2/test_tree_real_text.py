"""SmolLM2 in fp32 with trees from the shipped head: the target's own text (60 s; slow: an hour)."""

import json
from pathlib import Path

import pytest
from engines import running, speculative
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_eagle3.evaluation.demo_models import default_pair

PROMPTS = Path(__file__).parents[2] / "data" / "prompts.jsonl"
EVALUATION = Path(__file__).parents[4] / "shared" / "data" / "eval"  # beside the repository, if at all
SETTINGS = {
    "skip_tokenizer_init": False,
    "max_model_len": 1408,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
}


def answers(llm, turns, params):
    chats = [[{"role": "user", "content": turn}] for turn in turns]
    return [list(output.outputs[0].token_ids) for output in llm.chat(chats, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def turns():
    return [json.loads(line)["turns"][0] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def same_with_trees(turns, params, depth, topk, nodes, again=0, **settings):
    """Assert identical answers, and answer the last `again` turns a second time.

    Returns tokens per verification and the engine's counters.
    """
    target, draft = default_pair()
    with running(target, **SETTINGS) as llm:
        plain = answers(llm, turns, params)
    options = {"eagle3": {"tree": {"depth": depth, "topk": topk, "nodes": nodes}}}
    settings = SETTINGS | {"speculative_config": speculative(draft, nodes)} | settings
    with running(target, additional_config=options, **settings) as llm:
        assert answers(llm, turns, params) == plain
        if again:
            assert answers(llm, turns[-again:], params[-again:]) == plain[-again:]
        found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts, accepted = (found[f"vllm:spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens"))
    return 1 + accepted / drafts, found


def test_text_and_a_grammar_in_one_batch(turns):
    """The request with a grammar gets chains, the others trees."""
    greedy = SamplingParams(temperature=0, max_tokens=16)
    digits = SamplingParams(
        temperature=0, max_tokens=16, structured_outputs=StructuredOutputsParams(regex="[0-9 ]+")
    )
    assert same_with_trees(turns[:3], [greedy, digits, greedy], 4, 4, 12)[0] > 1.3


@pytest.mark.slow
def test_all_prompts_sampled(turns):
    """The target's noise is keyed by seed and position, so even sampled text is the same."""
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=64) for i in range(len(turns))]
    assert same_with_trees(turns, params, 6, 10, 60)[0] > 1.5


@pytest.mark.slow
@pytest.mark.skipif(not EVALUATION.is_dir(), reason=f"needs the evaluation's prompts in {EVALUATION}")
@pytest.mark.parametrize(
    ("batch", "first", "last", "blocks"), [(1, 0, 2, None), (3, 2, 8, 46), (8, 8, 20, 60)]
)
def test_a_hundred_prompts(batch, first, last, blocks):
    """20 prompts of each of the five tasks. Long prompts come in chunks, and memory is too small for a whole batch."""
    turns = []
    for task in ("mt_bench", "humaneval", "gsm8k", "alpaca", "cnn_dm"):
        lines = (EVALUATION / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        turns += [json.loads(line)["turns"][0] for line in lines[first:last]]
    params = [SamplingParams(temperature=0, max_tokens=64)] * len(turns)
    tau, found = same_with_trees(
        turns,
        params,
        6,
        10,
        60,
        again=1,  # for the prefix cache; more would not be left in it
        max_num_seqs=batch,
        block_size=32,
        num_gpu_blocks_override=blocks,
        enable_prefix_caching=True,
    )
    assert tau > 1.5 and found["vllm:prefix_cache_hits"] > 0
    assert (found["vllm:num_preemptions"] > 0) is (blocks is not None)
