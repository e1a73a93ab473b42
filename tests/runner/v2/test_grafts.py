"""Grafts change no token, and reach beyond the draft where the text repeats (about 60 s)."""

import random

import pytest
import torch
from closed_form import greedy_text
from engines import speculative, token_ids
from vllm import SamplingParams

from vllm_eagle3.reference.decode import look_up
from vllm_eagle3.tree.acceptance import accept

LENGTH = 40


def options(depth, topk, nodes, **graft):
    return {"eagle3": {"tree": {"depth": depth, "topk": topk, "nodes": nodes}, "graft": graft or True}}


def params(count, **kwargs):
    base = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True, "detokenize": False}
    return [
        SamplingParams(**(base | kwargs | ({"seed": 7 + i} if "temperature" in kwargs else {})))
        for i in range(count)
    ]


def counters(llm):
    return {m.name: getattr(m, "value", getattr(m, "values", None)) for m in llm.get_metrics()}


@pytest.mark.parametrize(("shape", "places"), [((3, 3, 9), 16), ((3, 3, 9), 20), ((4, 1, 4), 15)])
def test_a_prompt_that_holds_the_answer(engine, closed_form_target, closed_form_draft, shape, places):
    """The draft is wrong on multiples of 5; each verification accepts the whole graft all the same."""
    llm = engine(
        closed_form_target,
        speculative_config=speculative(closed_form_draft, places),
        additional_config=options(*shape),
    )
    prompts = [[last, *greedy_text(last, 70), 2, last, *greedy_text(last, 2)] for last in (11, 300, 77)]
    texts = token_ids(
        llm, prompts, params(3, max_tokens=41)
    )  # one from the prompt's step, then 9 a verification
    assert texts == [greedy_text(last, 43)[2:] for last in (11, 300, 77)]
    found = counters(llm)
    assert found["vllm:spec_decode_num_drafts"] == 3 * 5
    assert found["vllm:spec_decode_num_accepted_tokens"] == 3 * 5 * 8
    assert found["vllm:spec_decode_num_accepted_tokens_per_pos"][:8] == [15] * 8
    of_grafts = {m.labels["kind"]: m.value for m in llm.get_metrics() if m.name == "vllm:eagle3_graft_tokens"}
    assert set(of_grafts) == {"verified", "accepted"}
    assert of_grafts["verified"] == of_grafts["accepted"] >= 3 * 4 * 8  # the last step's arrive with the next


@pytest.fixture(scope="module")
def prompts():
    """Some repeat a part of themselves, some the start of their answer's own loop, some nothing."""
    rng = random.Random(2)
    texts = [[rng.randrange(512) for _ in range(n)] for n in (5, 40, 12, 90)]
    return [*texts, *(text[:20] * 3 + text[:3] for text in texts)]


@pytest.fixture
def plain(engine, models, prompts):
    """The target's own texts: greedy, and seeded at temperature 0.9."""
    llm = engine(models[0], block_size=32)
    greedy = token_ids(llm, prompts, params(len(prompts)))
    sampled = token_ids(llm, prompts, params(len(prompts), temperature=0.9, top_k=4))
    # The same prompts with their answers in front: the answer is copied.
    answers = [p + g + p for p, g in zip(prompts, greedy, strict=True)]
    copied = token_ids(llm, answers[:4], params(4))
    return greedy, sampled, answers[:4], copied


@pytest.mark.parametrize(("shape", "places"), [((3, 4, 10), 10), ((3, 1, 3), 11)])
def test_identity_with_preemption_and_prefix_hits(engine, models, prompts, plain, shape, places):
    greedy, sampled, answers, copied = plain
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], places),
        additional_config=options(*shape),
        num_gpu_blocks_override=13,
        max_num_seqs=4,
        block_size=32,
    )
    assert token_ids(llm, prompts, params(len(prompts))) == greedy
    accepted = counters(llm)["vllm:spec_decode_num_accepted_tokens"]
    assert accepted > 0
    assert token_ids(llm, prompts, params(len(prompts), temperature=0.9, top_k=4)) == sampled
    assert token_ids(llm, answers, params(4)) == copied
    for _ in range(2):
        assert token_ids(llm, answers[1:2], params(1)) == copied[1:2]
    found = counters(llm)
    assert found["vllm:num_preemptions"] > 0 and found["vllm:prefix_cache_hits"] > 0


def test_the_graft_is_the_references(engine, models, prompts, monkeypatch):
    """Every verified tree starts with what the reference looks up in the text so far."""
    from vllm_eagle3.runner.v2 import tree_rejection_sampler, tree_speculator

    seen = []
    original = tree_speculator.Grafts.merge

    def merge(self, *args):
        merged = original(self, *args)
        for row, request in enumerate(batch):
            end = int(self.req_states.total_len.gpu[request])
            if end > int(self.req_states.prefill_len.np[request]):
                text = self.req_states.all_token_ids.gpu[request, :end].tolist()
                length = int(merged.added[row])
                seen.append((text, length, merged.tokens[row].tolist(), merged.parents[row].tolist()))
        return merged

    look, batch = tree_speculator.Grafts.look_up, []

    def look_up_of(self, input_batch, *args):
        batch[:] = input_batch.idx_mapping.tolist()
        return look(self, input_batch, *args)

    monkeypatch.setattr(tree_speculator.Grafts, "look_up", look_up_of)
    monkeypatch.setattr(tree_speculator.Grafts, "merge", merge)
    assert tree_rejection_sampler.accept is accept
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], 12),
        additional_config=options(3, 4, 12, length=6, min_match=1),
    )
    texts = [p + t for p, t in zip(prompts, token_ids(llm, prompts, params(len(prompts))), strict=True)]
    grafts = 0
    for text, length, tokens, parents in seen:
        assert any(
            whole[: len(text)] == text[: len(whole)] for whole in texts
        )  # the last step goes beyond the end
        graft = look_up(text, 6, 1, 8)
        assert length <= len(graft)  # its later tokens may not be worth their places
        grafts += length > 0
        assert tokens[:length] == graft[:length] and parents[:length] == list(range(length))
    assert grafts > 20


def test_look_up_only(engine, closed_form_target, closed_form_draft, monkeypatch):
    """Policy auto: once grafts were accepted in full, no tree grows where all requests have one."""
    from vllm_eagle3.runner.v2.cpu_tree_speculator import CPUTreeSpeculator

    grown = []
    grow = CPUTreeSpeculator._grow
    monkeypatch.setattr(
        CPUTreeSpeculator, "_grow", lambda self, *a, **kw: [grown.append(1), grow(self, *a, **kw)]
    )
    shape = options(3, 3, 9)
    shape["eagle3"]["policy"] = "auto"
    llm = engine(
        closed_form_target, speculative_config=speculative(closed_form_draft, 9), additional_config=shape
    )
    repeated = [[last, *greedy_text(last, 150), 2, last, *greedy_text(last, 2)] for last in (11, 300)]
    texts = token_ids(llm, repeated, params(2, max_tokens=90))
    assert texts == [greedy_text(last, 92)[2:] for last in (11, 300)]
    at_first = len(grown)
    texts = token_ids(llm, repeated, params(2, max_tokens=90))
    assert texts == [greedy_text(last, 92)[2:] for last in (11, 300)]
    assert at_first > 0 and len(grown) - at_first <= 2  # the match is short where the answer begins
    texts = token_ids(llm, [[11], [300]], params(2, max_tokens=90))  # nothing to look up
    assert texts == [greedy_text(last, 90) for last in (11, 300)]
    assert len(grown) > at_first


def test_requests_that_need_a_chain_keep_one(engine, models, prompts, plain):
    """With penalties the path before a row matters: the text is that of plain decoding."""
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.2}
    expected = token_ids(engine(models[0]), prompts, params(len(prompts), **penalties))
    llm = engine(
        models[0], speculative_config=speculative(models[1], 12), additional_config=options(3, 4, 12)
    )
    assert token_ids(llm, prompts, params(len(prompts), **penalties)) == expected


def test_on_the_device_nothing_waits_for_the_host(monkeypatch):
    """The form for GPUs on `meta` tensors, which have no values to read."""
    from types import SimpleNamespace as Buffer

    from vllm_eagle3.config import GraftOptions
    from vllm_eagle3.runner.v2.grafts import Grafts
    from vllm_eagle3.runner.v2.tree_state import TreeState
    from vllm_eagle3.tree import graft as graft_module

    def walk(parents, tokens, sampled):
        return torch.zeros_like(parents, dtype=torch.int32), torch.zeros(
            len(parents), dtype=torch.int32, device="meta"
        )

    monkeypatch.setattr(graft_module, "tree_walk", walk)  # on a GPU a kernel
    meta = {"device": "meta", "dtype": torch.int64}
    states = Buffer(
        all_token_ids=Buffer(gpu=torch.zeros(4, 100, device="meta", dtype=torch.int32)),
        total_len=Buffer(gpu=torch.zeros(4, device="meta", dtype=torch.int32)),
    )
    batch = Buffer(
        num_reqs=3,
        idx_mapping=torch.zeros(3, **meta),
        cu_num_logits=torch.zeros(4, **meta),
        seq_lens_cpu_upper_bound=torch.tensor([49, 3, 4]),
    )
    grafts, tree_state = Grafts(GraftOptions(), states), TreeState(4, 10, 64, "meta")
    grafts.learn(batch, tree_state, torch.zeros(3, **meta))
    found = grafts.look_up(batch, tree_state)
    trees, values = torch.zeros(3, 10, **meta), torch.zeros(3, 10, device="meta")
    merged = grafts.merge(found, trees, trees, values, 10, torch.zeros(3, dtype=torch.bool, device="meta"))
    assert merged.tokens.shape == merged.parents.shape == (3, 10)
