"""Trees and chains drawn where requests sample, on a CPU: the distribution of texts, and seeds (90 s)."""

import math
import random

import pytest
import torch
from closed_form import VOCAB, next_token, write_draft, write_target
from engines import speculative, token_ids
from vllm import SamplingParams

from vllm_eagle3.runner import triton_interpreter

SCALE = math.log(VOCAB - 1)  # the successor has probability 1/2, every other token 1/1022
CRITICAL = 29.9  # chi-squared of 7 degrees of freedom, p = 1e-4
pytestmark = pytest.mark.skipif(
    triton_interpreter.enabled() or torch.cuda.is_available(), reason="nodes are drawn on a CPU only"
)


def options(depth, topk, nodes, **others):
    return {
        "eagle3": {"tree": {"depth": depth, "topk": topk, "nodes": nodes}, "draft_sampling": "auto", **others}
    }


CHAIN = {"draft_sampling": "auto"}
DRAFTS = {
    "tree": options(2, 3, 6),
    "tree with grafts": options(2, 3, 6, graft={"length": 3, "min_match": 1}),
    "tree, auto": options(2, 3, 6, policy="auto", graft={"length": 3, "min_match": 1}),
    "chain": {"eagle3": CHAIN},
    "chain, auto": {"eagle3": CHAIN | {"policy": "auto"}},
}


@pytest.mark.parametrize("form", DRAFTS)
@pytest.mark.parametrize("chance", [0.0, 0.7])
def test_text_follows_the_target(engine, tmp_path, form, chance):
    """Half of the requests are greedy or seeded, in the same batches."""
    target, draft = (
        write_target(tmp_path / "target", SCALE),
        write_draft(tmp_path / "draft", scale=SCALE - chance),
    )
    llm = engine(
        target,
        speculative_config=speculative(draft, 6 if form.startswith("tree") else 3),
        additional_config=DRAFTS[form],
        max_num_seqs=64,
    )
    plain = {"max_tokens": 12, "ignore_eos": True, "detokenize": False}
    drawn = SamplingParams(temperature=1.0, **plain)
    others = [SamplingParams(temperature=0, **plain), SamplingParams(temperature=1.0, seed=3, **plain)]
    starts = [[3, i % VOCAB] for i in range(192)]
    params = [drawn if i % 3 else others[i % 2] for i in range(len(starts))]
    counts = [0] * 8
    for i, (start, text) in enumerate(zip(starts, token_ids(llm, starts, params), strict=True)):
        for before, token in zip([start[-1], *text], text, strict=False):
            away = (token - next_token(before)) % VOCAB
            if i % 3:
                counts[0 if away == 0 else 1 + (away - 1) // 73] += 1
            elif i % 2 == 0:
                assert away == 0, "a greedy request"
    total = sum(counts)
    expected = [total / 2] + [total * 73 / 1022] * 7
    squared = sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True))
    assert total == 128 * 12 and squared < CRITICAL


def test_seeded_requests_keep_their_text(engine, models):
    """A seed's text is that of plain decoding, also beside requests whose nodes are drawn."""
    rng = random.Random(6)
    prompts = [[rng.randrange(512) for _ in range(20)] for _ in range(6)]
    base = {"temperature": 0.9, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
    seeded = [SamplingParams(**base, seed=i) for i in range(6)]
    expected = token_ids(engine(models[0]), prompts, seeded)
    llm = engine(models[0], speculative_config=speculative(models[1], 8), additional_config=options(3, 3, 8))
    mixed = [p for pair in zip(seeded, [SamplingParams(**base)] * 6, strict=True) for p in pair]
    found = token_ids(llm, [prompt for prompt in prompts for _ in range(2)], mixed)
    assert found[::2] == expected
    penalties = SamplingParams(**base, repetition_penalty=1.2)  # drawn as a chain
    assert all(len(text) == 24 for text in token_ids(llm, prompts, penalties))
