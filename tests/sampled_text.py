"""Does sampled text follow the target? A chi-squared test on the closed-form target at T = 1."""

import math

from closed_form import VOCAB, next_token, write_draft, write_target
from engines import speculative, token_ids

SCALE = math.log(VOCAB - 1)  # the successor has probability 1/2, every other token 1/1022
CRITICAL = 29.9  # chi-squared of 7 degrees of freedom, p = 1e-4


def statistic(engine, folder, prompts: int, **speculative_options) -> tuple[float, float]:
    """(chi-squared over the successor and seven bins of the rest, accepted drafts) for sampled text."""
    from vllm import SamplingParams

    target, draft = write_target(folder / "target", SCALE), write_draft(folder / "draft", scale=SCALE)
    llm = engine(target, speculative_config=speculative(draft, 2, **speculative_options), max_num_seqs=64)
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, detokenize=False)
    starts = [[3, i % VOCAB] for i in range(prompts)]
    counts = [0] * 8
    for start, text in zip(starts, token_ids(llm, starts, params), strict=True):
        for before, token in zip([start[-1], *text], text, strict=False):
            away = (token - next_token(before)) % VOCAB
            counts[0 if away == 0 else 1 + (away - 1) // 73] += 1
    total = sum(counts)
    expected = [total / 2] + [total * 73 / 1022] * 7
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    squared = sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True))
    return squared, found["vllm:spec_decode_num_accepted_tokens"]
