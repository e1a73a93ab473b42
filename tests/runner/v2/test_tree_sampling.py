"""Sampling parameters with trees, in one batch: tokens and log-probabilities are those of plain decoding (60 s)."""

import random

from engines import running, speculative
from tree_oracle import oracle
from vllm import SamplingParams

SIZES = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 128}
LENGTH = 24
CASES = {
    "greedy": {"temperature": 0},
    "logprobs": {"temperature": 0, "logprobs": 3},
    "top_p": {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "logit_bias": {"temperature": 1.0, "logit_bias": {5: 4.0, 6: 3.0}},
    "min_tokens": {"temperature": 1.0, "min_tokens": 6, "stop_token_ids": list(range(0, 512, 5))},
    "penalties": {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "presence": {"temperature": 0, "presence_penalty": 1.5},
}


def all_params():
    base = {"max_tokens": LENGTH, "detokenize": False, "ignore_eos": True}
    return [SamplingParams(**(base | case | {"seed": 7 + i})) for i, case in enumerate(CASES.values())]


def generate(llm, prompts):
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], all_params(), use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def test_tokens_and_logprobs_as_without_speculation(engine, models):
    rng = random.Random(4)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (5, 9, 17, 3, 30, 12, 8, 21)]
    with running(models[0], **SIZES) as llm:
        plain = generate(llm, prompts)
    options = {"eagle3": {"tree": {"depth": 4, "topk": 4, "nodes": 9}}}
    llm = engine(models[0], speculative_config=speculative(models[1], 9), additional_config=options, **SIZES)
    with oracle([p + list(o.token_ids) for p, o in zip(prompts, plain, strict=True)], 512) as seen:
        trees = generate(llm, prompts)
    assert seen.accepted > 40
    for name, expected, found in zip(CASES, plain, trees, strict=True):
        assert list(found.token_ids) == list(expected.token_ids), name
        assert found.finish_reason == expected.finish_reason, name
        for left, right in zip(expected.logprobs or (), found.logprobs or (), strict=True):
            assert left.keys() == right.keys(), name
            assert all(abs(left[k].logprob - right[k].logprob) < 1e-3 for k in left), name
