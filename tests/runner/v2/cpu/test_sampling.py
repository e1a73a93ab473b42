"""CPU forms of the sampler's kernels against the kernels (interpreted; 60 s)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import agree, forms
from vllm.v1.worker.gpu import structured_outputs
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample import (
    bad_words,
    gumbel,
    logit_bias,
    logprob,
    min_p,
    penalties,
    prompt_logprob,
    thinking_budget,
)

REQUESTS = 5
examples = settings(max_examples=10, deadline=None, derandomize=True)
VOCABS = st.sampled_from([1, 7, 512, 1023, 1025, 3000])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


class Rows:
    """Random rows of logits. The rows of a request are adjacent."""

    def __init__(self, seed: int, counts: list[int], vocab: int, dtype: torch.dtype = torch.float32) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.vocab, self.rows = vocab, sum(counts)
        requests = torch.randperm(REQUESTS, generator=self.g)[: len(counts)]
        lens = torch.tensor(counts)
        self.expanded = requests.repeat_interleave(lens)
        self.local = torch.cat([torch.arange(n) for n in counts]).int()
        self.cu_logits = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
        padded = torch.randn(self.rows, vocab + 3, generator=self.g) * 3  # rows lie apart
        self.logits = padded.to(dtype)[:, :vocab]
        self.positions = self.integers(0, 4000, self.rows)
        self.seeds = torch.randint(-(2**62), 2**62, (REQUESTS,), generator=self.g)
        self.inputs = self.integers(0, vocab, self.rows).int()
        self.tokens = self.integers(0, vocab, (REQUESTS, 40)).int()

    def integers(self, low: int, high: int, size) -> torch.Tensor:
        return torch.randint(low, high, size if isinstance(size, tuple) else (size,), generator=self.g)

    def floats(self, *values: float) -> torch.Tensor:
        return torch.tensor(values)[self.integers(0, len(values), REQUESTS)]


counts = st.lists(st.integers(1, 4), min_size=1, max_size=REQUESTS)
rows = st.builds(Rows, st.integers(0, 2**31), counts, VOCABS)


def mutated(function, logits, *args):
    function(logits, *args)
    return logits


@examples
@given(rows)
def test_temperature(r):
    logits = r.logits.contiguous()
    agree(mutated, gumbel.apply_temperature, logits, r.expanded, r.floats(0.0, 0.5, 1.0, 1.7), on=(gumbel,))


@examples
@given(st.integers(0, 2**31), counts, VOCABS, DTYPES, st.booleans(), st.booleans(), st.booleans())
def test_gumbel_sample(seed, counts, vocab, dtype, apply_temperature, drafting, fp64):
    r = Rows(seed, counts, vocab, dtype)
    agree(
        gumbel.gumbel_sample, r.logits, r.expanded, r.floats(0.0, 0.6, 1.0, 1.4), r.seeds, r.positions,
        apply_temperature, drafting, use_fp64=fp64,
    )  # fmt: skip


@examples
@given(st.integers(0, 2**31), st.integers(1, REQUESTS), st.booleans())
def test_gumbel_sample_keeps_the_drafts_logits(seed, batch, per_row):
    r = Rows(seed, [1] * batch, 700)
    column = r.integers(0, 3, batch) if per_row else torch.tensor(1)
    r.expanded[0] = -1  # a row of no request
    cache = torch.full((REQUESTS, 3, 704), 5.0)

    def sample(*args):
        return gumbel.gumbel_sample(
            *args, True, True, logits_cache=cache, logits_cache_col=column
        ), cache.clone()

    agree(sample, r.logits, r.expanded, r.floats(0.0, 1.0), r.seeds, r.positions, on=(gumbel,))


@examples
@given(rows)
def test_ties_go_to_the_first(r):
    logits = r.logits.round() * 0.0
    agree(gumbel.gumbel_sample, logits, r.expanded, torch.zeros(REQUESTS), r.seeds, r.positions, False, False)


@examples
@given(rows)
def test_min_p(r):
    agree(
        mutated,
        min_p.apply_min_p,
        r.logits.contiguous(),
        r.expanded,
        r.floats(0.0, 0.03, 0.4, 1.0),
        on=(min_p,),
    )


@examples
@given(rows)
def test_penalties(r):
    words = -(-r.vocab // 32)
    agree(
        mutated, penalties.apply_penalties, r.logits.contiguous(), r.expanded, r.inputs, r.local,
        r.floats(1.0, 1.3, 0.7), r.floats(0.0, 0.4), r.floats(0.0, -0.5),
        r.integers(-(2**31), 2**31, (REQUESTS, words)).int(), r.integers(0, 3, (REQUESTS, r.vocab)).int(),
        on=(penalties,),
    )  # fmt: skip


@examples
@given(rows)
def test_bincount(r):
    def count(*args):
        penalties.bincount(*args)
        return args

    prefill_len = r.integers(1, 41, REQUESTS).int()
    prompt_len = (prefill_len - r.integers(0, 9, REQUESTS)).clamp(min=1).int()
    requests, words = r.expanded.unique(), -(-r.vocab // 32)
    agree(
        count, requests, r.tokens, prompt_len, prefill_len, r.integers(0, 9, (REQUESTS, words)).int(),
        r.integers(0, 9, (REQUESTS, r.vocab)).int(), int(prefill_len.max()), on=(penalties,),
    )  # fmt: skip


@examples
@given(rows, st.booleans())
def test_logit_bias(r, restore):
    if restore:  # a grammar that lets only a stop token through
        r.logits[0] = -torch.inf
        r.logits[0, 0] = 1.0
    stops = torch.zeros(REQUESTS, 4, dtype=torch.int32)
    stops[:, :3] = r.integers(0, r.vocab, (REQUESTS, 3))

    def distinct(width):
        ids = [torch.randperm(max(r.vocab, width), generator=r.g)[:width] % r.vocab for _ in range(REQUESTS)]
        return torch.stack(ids).int()

    width = min(r.vocab, 6)
    agree(
        mutated, logit_bias.apply_logit_bias, r.logits.contiguous(), r.expanded, r.positions % 30,
        (r.integers(0, 2, REQUESTS) * r.integers(0, width + 1, REQUESTS)).int(), distinct(width),
        r.integers(0, width + 1, REQUESTS).int(), distinct(width), torch.randn(REQUESTS, width, generator=r.g),
        r.integers(0, 30, REQUESTS).int(), r.integers(0, 4, REQUESTS).int(), r.integers(0, 2, REQUESTS).int(), stops,
        restore, on=(logit_bias,),
    )  # fmt: skip


@examples
@given(st.integers(0, 2**31), counts)
def test_bad_words(seed, counts):
    r = Rows(seed, counts, 3)  # few tokens, so that words match
    offsets = torch.tensor([0, 1, 3, 6, 8]).int().expand(REQUESTS, 5).contiguous()
    prompt_len = r.integers(1, 10, REQUESTS).int()
    total_len = (prompt_len + r.integers(0, 8, REQUESTS)).int()
    agree(
        mutated, bad_words.apply_bad_words, r.logits.contiguous(), r.expanded, r.integers(0, 3, (REQUESTS, 8)).int(),
        offsets, r.integers(0, 5, REQUESTS).int(), r.tokens, prompt_len, total_len, r.inputs, r.local, 4,
        on=(bad_words,),
    )  # fmt: skip


@examples
@given(rows, st.integers(0, 5))
def test_logprobs_and_ranks(r, number):
    found = agree(logprob.compute_topk_scores, r.logits, min(number, r.vocab), r.inputs.long())
    half = r.logits.bfloat16()  # which the interpreter compares as integers
    ranks = torch.empty(r.rows, dtype=torch.int64)
    forms()["vllm.v1.worker.gpu.sample.logprob._ranks_kernel"](ranks, half, 0, r.inputs, r.vocab, 8192)
    assert torch.equal(ranks, (half >= half.gather(1, r.inputs.long()[:, None])).sum(-1))
    assert len(found.selected_token_ranks) == r.rows


@examples
@given(st.integers(0, 2**31), counts, st.integers(0, 5))
def test_logprobs_of_given_tokens(seed, counts, number):
    r = Rows(seed, counts, 512)
    state = logprob.LogprobTokenIdsState(REQUESTS, torch.device("cpu"))
    state.token_ids.gpu.copy_(r.integers(0, 512, tuple(state.token_ids.gpu.shape)))
    state.num_token_ids.np[:] = r.integers(0, 4, REQUESTS).numpy()
    state.num_token_ids.copy_to_uva()

    def scores():
        found = logprob.compute_topk_scores(r.logits, number, r.inputs.long(), None, state, r.expanded, 3)
        return found.logprob_token_ids, found.logprobs, found.selected_token_ranks

    agree(scores, on=(logprob,))


@examples
@given(st.integers(0, 2**31), counts)
def test_tokens_of_prompt_logprobs(seed, counts):
    r = Rows(seed, counts, 512)
    agree(
        prompt_logprob.get_prompt_logprobs_token_ids, r.rows, r.cu_logits, r.expanded[r.cu_logits[:-1].long()],
        r.integers(0, 30, REQUESTS).int(), r.tokens,
    )  # fmt: skip


@examples
@given(st.integers(0, 2**31), counts, VOCABS)
def test_grammar_bitmask(seed, counts, vocab):
    r = Rows(seed, counts, vocab)
    stride = 5
    places = [i * stride + j for i, n in enumerate(counts) for j in range(n + 1)][
        : r.rows + 1
    ]  # one row too many
    masks = r.integers(-(2**31), 2**31, (len(places), -(-vocab // 32))).int()

    def apply(logits, places, cu_logits, masks):
        structured_outputs._apply_grammar_bitmask_kernel[(len(places), -(-vocab // 8192))](
            logits, logits.stride(0), places, cu_logits, masks, masks.stride(0), vocab, MASK_STRIDE=stride,
            BLOCK_SIZE=8192,
        )  # fmt: skip
        return logits

    logits = r.logits.contiguous()
    agree(apply, logits, torch.tensor(places).int(), r.cu_logits, masks, on=(structured_outputs,))


@examples
@given(rows)
def test_nans_are_counted(r):
    r.logits[r.logits > 2] = torch.nan
    agree(get_num_nans, r.logits)


@examples
@given(st.integers(0, 2**31), counts, st.booleans())
def test_thinking_budget(seed, counts, warm):
    r = Rows(seed, counts, 3)  # few tokens, so that markers match
    total_len = r.integers(4, 36, REQUESTS).int()
    caches = [
        torch.full((REQUESTS,), -1).int(),
        torch.full((REQUESTS,), -1).int(),
        torch.zeros(REQUESTS).int(),
    ]
    if warm:
        caches[2][:] = total_len + r.integers(-4, 3, REQUESTS)
    markers = [torch.tensor(ids).int() for ids in ([1, 2], [2, 0], [2, 0, 1])]

    def apply(logits, requests, *args):
        thinking_budget.apply_thinking_budget(logits, requests, *args)
        start, end, scanned = args[6:9]
        return logits, start > end, scanned  # only the order of the two is used

    agree(
        apply, r.logits.contiguous(), r.expanded[r.cu_logits[:-1].long()], r.expanded,
        r.integers(-1, 12, REQUESTS).int(), r.tokens, total_len, r.inputs, r.local, *caches, *markers,
        on=(thinking_budget,),
    )  # fmt: skip


@pytest.mark.parametrize("marker", [[7], [7, 8]])
def test_last_match(marker):
    from vllm_eagle3.runner.v2.cpu.thinking_budget import last_match

    text = [7, 8, 1, 7, 8, 7]
    naive = [i for i in range(len(text)) if text[i : i + len(marker)] == marker]
    for begin in range(len(text)):
        assert last_match(text, marker, begin) == max((i for i in naive if i >= begin), default=-1)


def test_uniform_is_tl_rand():
    import triton
    import triton.language as tl

    from vllm_eagle3.runner.v2.cpu.philox import uniform

    @triton.jit
    def rand(out, seeds, offsets, N: tl.constexpr):
        for i in range(N):
            tl.store(out + i, tl.rand(tl.load(seeds + i), tl.load(offsets + i)))

    g = torch.Generator().manual_seed(0)
    seeds, offsets = (torch.randint(-(2**63), 2**63 - 1, (32,), generator=g) for _ in range(2))
    out = torch.empty(32)
    rand[(1,)](out, seeds, offsets, N=32)
    found = [uniform(*pair) for pair in zip(seeds.tolist(), offsets.tolist(), strict=True)]
    assert np.array_equal(out.numpy(), np.array(found, np.float32))
