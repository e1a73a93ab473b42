"""Trees change no token: greedy and seeded sampling, on closed-form and random weights (about 150 s)."""

import random

import pytest
from closed_form import greedy_text, write_draft
from engines import running, speculative, token_ids
from random_llama import write_draft as write_random_draft
from random_llama import write_target as write_random_target
from tree_oracle import oracle
from vllm import SamplingParams

LENGTH = 36
SMALL_STEPS = {  # four requests at a time, prompts in chunks, mixed with decoding trees
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "block_size": 32,
}


def params(count, **kwargs):
    base = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "detokenize": False}
    return [SamplingParams(**(base | kwargs | ({"seed": 100 + i} if kwargs else {}))) for i in range(count)]


def tree_options(depth, topk, nodes):
    return {"eagle3": {"tree": {"depth": depth, "topk": topk, "nodes": nodes}}}


def metrics(llm):
    return {m.name: getattr(m, "value", getattr(m, "values", None)) for m in llm.get_metrics()}


def preemptions(llm):
    return metrics(llm)["vllm:num_preemptions"]


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(1)
    return [[rng.randrange(512) for _ in range(n)] for n in (3, 17, 70, 33, 5, 120, 9, 64, 31, 150)]


@pytest.fixture(scope="module")
def random_target(tmp_path_factory):
    return write_random_target(tmp_path_factory.mktemp("random") / "target")


@pytest.fixture(scope="module")
def random_draft(tmp_path_factory):
    return write_random_draft(tmp_path_factory.mktemp("random") / "draft")


@pytest.fixture(scope="module")
def plain(random_target, prompts):
    """The random target's own texts: greedy, seeded at temperature 0.9, and a longer greedy text of prompt 6."""
    with running(random_target, **SMALL_STEPS) as llm:
        greedy = token_ids(llm, prompts, params(len(prompts)))
        sampled = token_ids(llm, prompts, params(len(prompts), temperature=0.9, top_k=60))
        (long,) = token_ids(llm, prompts[6:7], params(1, max_tokens=2 * LENGTH))
    assert greedy != sampled
    return greedy, sampled, long


def test_closed_form(engine, closed_form_target, tmp_path):
    """If the draft's first choice is wrong, its second is right, so every step accepts a whole path."""
    draft = write_draft(tmp_path / "draft", second_best=0.5)
    llm = engine(
        closed_form_target,
        speculative_config=speculative(draft, 12),
        additional_config=tree_options(4, 3, 12),
    )
    steps = (
        slice(1, 5),
        slice(6, 10),
        slice(11, 15),
    )  # 16 tokens: one of the prompt's step, then three paths of 4

    def one_mistake_a_step(last):
        return all(sum(t % 5 == 0 for t in greedy_text(last, 16)[step]) <= 1 for step in steps)

    lasts = [t for t in range(27, 512) if one_mistake_a_step(t)]
    assert any(t % 5 == 0 for last in lasts[:8] for t in greedy_text(last, 16))
    for batch in (1, 3, 8):
        prompts = [[3, 9, last] for last in lasts[:batch]]
        before = metrics(llm)
        texts = token_ids(
            llm, prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        )
        assert texts == [greedy_text(p[-1], 16) for p in prompts]
        after = metrics(llm)
        assert [
            after[f"vllm:spec_decode_{name}"] - before[f"vllm:spec_decode_{name}"]
            for name in ("num_drafts", "num_accepted_tokens")
        ] == [3 * batch, 12 * batch]
        depths = [m["vllm:spec_decode_num_accepted_tokens_per_pos"] for m in (before, after)]
        by_depth = [now - then for then, now in zip(*depths, strict=True)]
        assert by_depth == [3 * batch] * 4 + [0] * 8, "position i of vLLM's counter is depth i + 1 of a tree"


def test_oracle_trees_with_preemption_chunks_and_prefix_hits(
    engine, random_target, random_draft, prompts, plain
):
    llm = engine(
        random_target,
        speculative_config=speculative(random_draft, 9),
        additional_config=tree_options(4, 4, 9),
        num_gpu_blocks_override=11,
        **SMALL_STEPS,
    )
    greedy, sampled, long = plain
    with oracle([p + t for p, t in zip(prompts, greedy, strict=True)], 512) as seen:
        assert token_ids(llm, prompts, params(len(prompts))) == greedy
        assert seen.accepted > 100
        assert seen.moved > 50
        # Continue a text from cached blocks whose KV a tree has committed (the last full block is computed again).
        text = prompts[6] + long
        for stop in (len(prompts[6]), len(text) - 8):
            seen.texts[int(llm.request_counter.counter)] = text
            (last,) = llm.generate(
                {"prompt_token_ids": text[:stop]}, params(1, max_tokens=len(text) - stop)[0], use_tqdm=False
            )
            assert list(last.outputs[0].token_ids) == text[stop:]
        assert last.num_cached_tokens == 32 > len(prompts[6])
    assert preemptions(llm) > 0
    with oracle([p + t for p, t in zip(prompts, sampled, strict=True)], 512, seed=1) as seen:
        first = int(llm.request_counter.counter)
        seen.texts |= {first + i: p + t for i, (p, t) in enumerate(zip(prompts, sampled, strict=True))}
        assert token_ids(llm, prompts, params(len(prompts), temperature=0.9, top_k=60)) == sampled
        assert seen.accepted > 100
