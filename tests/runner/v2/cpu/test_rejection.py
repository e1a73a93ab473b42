"""CPU forms of the kernels that verify drafts, against the kernels (interpreted; 60 s)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import agree
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

REQUESTS, STEPS = 5, 4
examples = settings(max_examples=15, deadline=None, derandomize=True)
counts = st.lists(st.integers(1, STEPS + 1), min_size=1, max_size=REQUESTS)


def verify(seed, counts, vocab, dtype=torch.float32, temperatures=(0.0,), drafts="none", **options):
    """Verify random drafts, most of which are likely. `drafts`: whether the draft's distributions are known."""
    g = torch.Generator().manual_seed(seed)
    lens = torch.tensor(counts)
    rows, requests = int(lens.sum()), torch.randperm(REQUESTS, generator=g)[: len(counts)]
    logits = (torch.randn(rows, vocab, generator=g) * 2).to(dtype)
    likely = torch.cat([torch.zeros(1, dtype=torch.int64), logits.float().argmax(-1)[:-1]])
    wild = torch.randint(-1, vocab, (rows,), generator=g)  # -1: a placeholder
    sampled = torch.where(torch.rand(rows, generator=g) < 0.75, likely, wild).int()
    draft_logits = torch.randn(REQUESTS, STEPS, vocab, generator=g) * 2 if drafts == "known" else None
    agree(
        rejection_sample,
        logits,
        draft_logits,
        sampled,
        torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int(),
        torch.randint(0, 4000, (rows,), generator=g),
        requests,
        requests.repeat_interleave(lens),
        torch.cat([torch.arange(n) for n in counts]).int(),
        torch.tensor(temperatures)[torch.randint(0, len(temperatures), (REQUESTS,), generator=g)],
        torch.randint(-(2**62), 2**62, (REQUESTS,), generator=g),
        STEPS,
        **options,
    )


seeds = st.integers(0, 2**31)


@examples
@given(seeds, counts, st.sampled_from([3, 512, 1025]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_greedy(seed, counts, vocab, dtype):
    verify(seed, counts, vocab, dtype)


@examples
@given(seeds, counts, st.sampled_from([3, 513]), st.sampled_from(["none", "known"]), st.booleans())
def test_sampled(seed, counts, vocab, drafts, fp64):
    verify(seed, counts, vocab, temperatures=(0.0, 0.7, 1.0), drafts=drafts, use_fp64=fp64)


@examples
@given(seeds, counts, st.sampled_from([3, 65]), st.sampled_from(["none", "known"]))
def test_block_verification(seed, counts, vocab, drafts):
    verify(seed, counts, vocab, temperatures=(0.0, 0.7, 1.0), drafts=drafts, use_block_verification=True)


@examples
@given(seeds, counts)
def test_synthetic_acceptance(seed, counts):
    rates = torch.tensor([0.9, 0.7, 0.5, 0.3])
    verify(seed, counts, 65, temperatures=(0.0, 1.0), synthetic_conditional_rates=rates)
