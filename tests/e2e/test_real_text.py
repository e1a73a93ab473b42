"""SmolLM2 with the shipped head: fp32 text is the target's on 40 prompts (120 s)."""

import json
from pathlib import Path

import pytest
from engines import speculative
from vllm import SamplingParams

from vllm_eagle3.evaluation.demo_models import default_pair

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


@pytest.fixture(scope="module")
def pair():
    return default_pair()


def answers(llm, max_tokens=32):
    turns = [json.loads(line)["turns"][0] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    chats = [[{"role": "user", "content": turn}] for turn in turns]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_greedy_text_is_the_targets(engine, pair):
    target, draft = pair
    settings = {"skip_tokenizer_init": False, "max_model_len": 1024, "max_num_batched_tokens": 1024}
    plain = answers(engine(target, **settings))
    llm = engine(target, speculative_config=speculative(draft, 4), **settings)
    assert len(plain) == 40
    assert answers(llm) == plain
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts, accepted = (found[f"vllm:spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens"))
    assert 1 + accepted / drafts > 1.5  # the head is trained; docs/benchmarks.md has measured figures
