"""Every sampling parameter in every kind of step. The engines of both runners must give the same answers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIZES = {"max_num_seqs": 3, "max_num_batched_tokens": 64, "max_model_len": 256, "max_logprobs": -1}
SAMPLED = {"temperature": 1.0}
# Parameters that are tested at each temperature; `min_p` and `logit_bias` only where speculation allows them.
PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature alone": {},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k above the vocabulary": {"top_k": 100_000},
    "top_p": {"top_p": 0.9},
    "top_k and top_p": {"top_k": 5, "top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "seed": {"seed": 7},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.4},
    "logit_bias": {"logit_bias": {5: 4.0, 6: -100.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(0, 512, 3))},
    "bad words": {"_bad_words_token_ids": [[7], [8, 9]]},
    "min_tokens": {"min_tokens": 4, "stop_token_ids": list(range(0, 512, 2))},
    "stop_token_ids": {"stop_token_ids": list(range(0, 512, 17))},
    "logprobs": {"logprobs": 3},
    "logprobs of all tokens": {"logprobs": -1},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "logprob_token_ids": {"logprob_token_ids": [1, 2, 3]},
    "n": {"n": 2},
    "everything": {
        "top_k": 20, "top_p": 0.95, "seed": 3, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.1, "allowed_token_ids": list(range(400)), "min_tokens": 2,
        "_bad_words_token_ids": [[7], [8, 9]], "logprobs": 2,
    },
}  # fmt: skip
V2_ONLY = ("min_p", "logit_bias")

# Kind of steps -> (lengths of the prompts, tokens to generate, drafts a request).
STEPS = {
    "all prefill": ((5, 9), 1, 3),
    "no drafts": ((5, 9), 6, 0),
    "all drafts": ((5, 9), 8, 3),
    "mixed": ((5, 90, 20, 70), 8, 3),
}


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(sum(lengths))
    return [[rng.randrange(512) for _ in range(n)] for n in lengths]


def params(asked: dict[str, Any], tokens: int, temperature: float) -> Any:
    from vllm import SamplingParams

    wanted = {"temperature": temperature, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    refused = "n" if temperature == 0.0 else None  # vLLM answers a greedy request once
    public = {key: v for key, v in (wanted | asked).items() if not key.startswith("_") and key != refused}
    made = SamplingParams(**public | {"min_tokens": min(asked.get("min_tokens", 0), tokens)})
    made._bad_words_token_ids = asked.get("_bad_words_token_ids")  # needs a tokenizer otherwise
    return made


def answers(llm: Any, asked: dict[str, Any], kind: str, temperature: float) -> list[list[list[int]]]:
    """Token ids of each prompt's completions in steps of this kind."""
    lengths, tokens, _ = STEPS[kind]
    wanted = params(asked, tokens, temperature)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts(lengths)], wanted, use_tqdm=False)
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


@contextmanager
def steps_of(llm: Any, kind: str) -> Iterator[set[str]]:
    """Make the policy of `llm` draft as in steps of this `kind`. The set receives the kinds that really occurred."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    policy, update, seen = scheduler.draft_policy, scheduler.update_from_output, set()
    shape = policy.by_nodes[STEPS[kind][2]]

    def noted(step: Any, output: Any) -> Any:
        if step.num_scheduled_tokens:
            drafting = set(step.scheduled_spec_decode_tokens)
            rest = {r: n for r, n in step.num_scheduled_tokens.items() if r not in drafting}
            prefilling = {r for r, n in rest.items() if n > 1}
            if drafting:
                seen.add("mixed" if prefilling else "all drafts" if not rest else "some drafts")
            else:
                seen.add("all prefill" if prefilling else "no drafts")
        return update(step, output)

    policy.choose, policy.lengths = (lambda *_: shape), (lambda requests, shape, context, made: made)
    scheduler.update_from_output = noted
    try:
        yield seen
    finally:
        del policy.choose, policy.lengths, scheduler.update_from_output


def obeys(asked: dict[str, Any], ids: list[int], tokens: int, greedy: list[int]) -> bool:
    """Whether sampled `ids` are a possible answer. `greedy` is the answer at temperature 0."""
    least = min(asked.get("min_tokens", 0), tokens) if "stop_token_ids" in asked else tokens
    allowed = set(asked.get("allowed_token_ids", range(512)))
    pairs = {tuple(pair) for pair in zip(ids, ids[1:], strict=False)}
    stop = asked.get("stop_token_ids", ())
    return (
        (least <= len(ids) <= tokens or bool(ids) and ids[-1] in stop)
        and set(ids) <= allowed
        and not ("_bad_words_token_ids" in asked and (7 in ids or (8, 9) in pairs))
        and not any(i in stop for i in ids[:-1])
        and not ("logit_bias" in asked and 6 in ids)
        and not (asked.get("top_k") == 1 and ids != greedy)
    )
