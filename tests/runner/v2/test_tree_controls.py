"""Each part of tree verification is needed: if one of them is switched off, the text changes (60 s)."""

import random

import pytest
import torch
from engines import running, speculative, token_ids
from random_llama import write_draft, write_target
from tree_oracle import oracle
from vllm import SamplingParams

from vllm_eagle3.runner.v2 import tree_model_state, tree_state

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "max_model_len": 128}


def no_commit(patch):
    patch.setattr(tree_model_state, "commit_kv", lambda *args: None)


def no_mask(patch):
    """Every node sees the nodes before it, as in a chain."""

    def linear(parents):
        depth, bits = original(parents)
        return depth, (torch.ones_like(bits) << torch.arange(1, bits.shape[1] + 1)) - 1

    original = tree_state.ancestor_bits
    patch.setattr(tree_state, "ancestor_bits", linear)


def no_depth(patch):
    """Positions of the slots instead of base + depth."""

    def linear(parents):
        depth, bits = original(parents)
        return torch.arange(depth.shape[1], dtype=depth.dtype).expand_as(depth), bits

    original = tree_state.ancestor_bits
    patch.setattr(tree_state, "ancestor_bits", linear)


@pytest.mark.slow
def test_controls(engine, tmp_path, monkeypatch):
    target, draft = write_target(tmp_path / "target"), write_draft(tmp_path / "draft")
    rng = random.Random(2)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (5, 40, 17, 9)]
    with running(target, **SIZES) as llm:
        plain = token_ids(llm, prompts, GREEDY)
    options = {"eagle3": {"tree": {"depth": 4, "topk": 4, "nodes": 9}}}
    llm = engine(target, speculative_config=speculative(draft, 9), additional_config=options, **SIZES)
    texts = [p + t for p, t in zip(prompts, plain, strict=True)]
    for switch in (None, no_commit, no_mask, no_depth):
        with monkeypatch.context() as patch, oracle(texts, 512, seed=3):
            if switch is not None:
                switch(patch)
            found = token_ids(llm, prompts, GREEDY)
        llm.reset_prefix_cache()
        assert (found == plain) is (switch is None), switch
