"""The states that a tree's draft reads: one branch drafts as a chain does, and so does the step after a path (90 s)."""

import random
import sys

import pytest
import torch
from engines import running, speculative, token_ids
from tree_oracle import oracle
from vllm import SamplingParams
from vllm.triton_utils import HAS_TRITON

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256}


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(1)
    return [[rng.randrange(512) for _ in range(n)] for n in (3, 70, 33, 120, 9)]


@pytest.fixture(scope="module")
def texts(models, prompts):
    with running(models[0], **SIZES) as llm:
        return [p + t for p, t in zip(prompts, token_ids(llm, prompts, GREEDY), strict=True)]


def tree(depth, topk, nodes):
    return {"eagle3": {"tree": {"depth": depth, "topk": topk, "nodes": nodes}}}


def test_the_draft_continues_from_the_accepted_path(engine, models, prompts, texts):
    """The root's children are the same after trees whose path was accepted and after trees of which nothing was."""
    llm = engine(
        models[0], speculative_config=speculative(models[1], 9), additional_config=tree(4, 4, 9), **SIZES
    )
    seen = []
    for truth in (texts, None):
        first = int(llm.request_counter.counter)
        with oracle(truth, 512) as record:
            assert [p + t for p, t in zip(prompts, token_ids(llm, prompts, GREEDY), strict=True)] == texts
        seen.append({(request - first, p): ids for (request, p), ids in record.root_children.items()})
        llm.reset_prefix_cache()
    after_paths, after_lines = seen
    assert record.accepted == 0
    common = after_paths.keys() & after_lines.keys()
    assert len(common) > 40
    assert all(after_paths[key] == after_lines[key] for key in common)


def recorded_chain_drafts(monkeypatch, cls):
    """Patch `cls.propose` to record its drafts by (request, position of the last accepted token)."""
    drafts = {}
    original = cls.propose

    def propose(self, input_batch, *args, **kwargs):
        out = original(self, input_batch, *args, **kwargs)
        num_sampled, num_rejected = args[4], args[5]
        for b, req_id in enumerate(input_batch.req_ids):
            if not kwargs.get("dummy_run") and int(num_sampled[b]):
                last = int(input_batch.seq_lens[b] - num_rejected[b])
                drafts[int(req_id.split("-")[0]), last] = out[b].tolist()
        return out

    monkeypatch.setattr(cls, "propose", propose)
    return drafts


def test_one_branch_is_the_chain(models, prompts, texts, monkeypatch):
    from vllm_eagle3.runner.v2.cpu_speculator import CPUSpeculator
    from vllm_eagle3.runner.v2.speculator import Eagle3Speculator
    from vllm_eagle3.runner.v2.tree_speculator import TreeSpeculator

    drafts, chains = [], Eagle3Speculator if HAS_TRITON else CPUSpeculator
    for cls, extra in ((chains, {}), (TreeSpeculator, {"additional_config": tree(4, 1, 4)})):
        with monkeypatch.context() as patch:
            drafts.append(recorded_chain_drafts(patch, cls))
            with running(models[0], speculative_config=speculative(models[1], 4), **SIZES, **extra) as llm:
                assert [p + t for p, t in zip(prompts, token_ids(llm, prompts, GREEDY), strict=True)] == texts
    chain, one_branch = drafts
    assert chain.keys() == one_branch.keys()
    assert len(chain) > 40
    assert chain == one_branch


def paths_of(tokens, parents):
    """Root-to-node paths of a tree's used nodes, whatever their order. Node i + 1 is entry i."""
    paths = {0: ()}
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True), 1):
        if parent >= 0:
            paths[node] = (*paths[parent], token)
    return set(paths.values()) - {()}


@pytest.mark.parametrize("in_pieces", [False, True])
def test_trees_are_the_references(engine, models, prompts, texts, monkeypatch, in_pieces):
    """The engine's trees equal those of the reference decoder in every step of the same texts.

    "In pieces" means: requests and blocks of the cache one at a time, and the head that CUDA devices use.
    """
    from transformers import AutoModelForCausalLM

    from vllm_eagle3.kernels import path_attention
    from vllm_eagle3.model.draft import Eagle3LlamaDraft
    from vllm_eagle3.reference.decode import decode, eagle2_tree
    from vllm_eagle3.reference.draft import load_draft
    from vllm_eagle3.runner.v2 import tree_speculator
    from vllm_eagle3.runner.v2.tree_speculator import TreeSpeculator

    if in_pieces:
        monkeypatch.setattr(tree_speculator, "MOST_LOGITS", 1)
        monkeypatch.setattr(sys.modules[path_attention.__module__], "GATHERED", 1)
        monkeypatch.setattr(Eagle3LlamaDraft, "_fuses_head", lambda self, x: True)
    grown, expected = {}, {}
    original = TreeSpeculator.propose

    def propose(self, input_batch, *args, **kwargs):
        tokens = original(self, input_batch, *args, **kwargs)
        for b, req_id in enumerate(input_batch.req_ids):
            key = int(req_id.split("-")[0]), int(self.input_buffers.positions[b]) + 1
            grown[key] = paths_of(tokens[b].tolist(), self.parents[b].tolist())
        return tokens

    monkeypatch.setattr(TreeSpeculator, "propose", propose)
    llm = engine(
        models[0], speculative_config=speculative(models[1], 10), additional_config=tree(4, 3, 10), **SIZES
    )
    speculator = (
        llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.speculator
    )
    kinds = set()
    speculator.model.register_forward_pre_hook(
        lambda module, args, kwargs: kinds.add(kwargs["input_ids"].dtype), with_kwargs=True
    )
    assert [p + t for p, t in zip(prompts, token_ids(llm, prompts, GREEDY), strict=True)] == texts
    compiled = {speculator.input_buffers.input_ids.dtype} if type(speculator) is TreeSpeculator else set()
    assert kinds == compiled, "compiled for one type, it would misread others"

    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    embeddings, head = model.get_input_embeddings().weight.data, model.lm_head.weight.data
    draft = load_draft(models[1], target=models[0], embeddings=embeddings, head=head)
    for i, prompt in enumerate(prompts):

        def propose(draft, a, kv, text, request=i):
            found = eagle2_tree(4, 3, 10)(draft, a, kv, text)
            expected[request, len(text) - 1] = paths_of(found.tokens[1:], found.parents[1:])
            return found

        assert prompt + decode(model, draft, prompt, propose, GREEDY.max_tokens).tokens == texts[i]
    common = expected.keys() & grown.keys()
    assert len(common) > 80
    assert sum(expected[key] == grown[key] for key in common) >= 0.98 * len(
        common
    )  # rounding may break near-ties


@pytest.mark.parametrize("fill", [float("nan"), 0.0])
def test_a_broken_draft_changes_nothing(engine, models, prompts, texts, fill):
    """The draft is broken while it serves, because a draft with such weights on disk is not loaded."""
    llm = engine(
        models[0], speculative_config=speculative(models[1], 8), additional_config=tree(3, 3, 8), **SIZES
    )
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    for name, weight in runner.speculator.model.named_parameters():
        if "embed_tokens" not in name:  # the target's
            weight.data.fill_(fill)
    assert [p + t for p, t in zip(prompts, token_ids(llm, prompts, GREEDY), strict=True)] == texts
    assert torch.isfinite(torch.tensor([m.value for m in llm.get_metrics() if hasattr(m, "value")])).all()
