"""CPU forms of the kernels that make a step's inputs, against the kernels (interpreted; 40 s)."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import agree, replaced, same
from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import speculator

REQUESTS, LONGEST, MOST_TOKENS = 7, 96, 64
examples = settings(max_examples=12, deadline=None, derandomize=True)


class Batch:
    """A random batch: requests in any order, some of them prefilling, with up to 4 drafts each."""

    def __init__(self, seed: int, size: int) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.size = size
        self.requests = torch.randperm(REQUESTS, generator=self.g)[:size]
        self.lens = self.integers(1, MOST_TOKENS // size + 1, size)
        self.starts = self.cumulative(self.lens)
        self.tokens = int(self.starts[-1])
        self.computed = self.integers(0, LONGEST - MOST_TOKENS, REQUESTS).int()
        self.prefill_len = self.integers(1, LONGEST, REQUESTS).int()
        self.seq_lens = torch.full((REQUESTS,), 77, dtype=torch.int32)
        self.seq_lens[:size] = self.computed[self.requests] + self.lens
        self.logits = torch.minimum(self.lens, self.integers(1, 6, size))
        self.cu_logits = self.cumulative(self.logits)
        self.all_tokens = self.integers(0, 500, (REQUESTS, LONGEST)).int()

    def integers(self, low: int, high: int, size) -> torch.Tensor:
        return torch.randint(low, high, size if isinstance(size, tuple) else (size,), generator=self.g)

    def garbage(self, size, dtype=torch.int32) -> torch.Tensor:
        return self.integers(-9, 0, size).to(dtype)

    @staticmethod
    def cumulative(lens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()


batches = st.builds(Batch, st.integers(0, 2**31), st.integers(1, REQUESTS))


@examples
@given(batches, st.integers(1, 3))
def test_prepare_prefill_inputs(b, lookahead):
    agree(
        input_batch.prepare_prefill_inputs, b.garbage(MOST_TOKENS + 3), b.garbage((lookahead, REQUESTS)), b.requests,
        b.starts, b.all_tokens, b.prefill_len, b.computed,
    )  # fmt: skip


@examples
@given(batches)
def test_prepare_pos_seq_lens(b):
    agree(
        input_batch.prepare_pos_seq_lens, b.requests, b.starts, b.computed, b.garbage(MOST_TOKENS + 3, torch.int64),
        b.seq_lens,
    )  # fmt: skip


@examples
@given(batches, st.booleans(), st.integers(0, 1))
def test_combine_sampled_and_draft_tokens(b, column, new):
    last = b.integers(0, 500, (REQUESTS, 1) if column else REQUESTS)
    agree(
        input_batch.combine_sampled_and_draft_tokens, b.garbage(MOST_TOKENS), b.requests, last, b.starts, b.seq_lens,
        b.prefill_len, b.integers(0, 500, (REQUESTS, 5)), b.cu_logits, int(b.cu_logits[-1]), new,
    )  # fmt: skip


@examples
@given(batches)
def test_get_num_sampled_and_rejected(b):
    sampled = torch.minimum(b.integers(1, 6, b.size), b.logits).int()
    agree(
        input_batch.get_num_sampled_and_rejected, sampled, b.seq_lens, b.cu_logits, b.requests, b.prefill_len
    )


@examples
@given(batches, st.booleans(), st.booleans(), st.booleans())
def test_post_update(b, counted, started, masked):
    sampled = b.integers(0, 500, (b.size, 5))
    requests = b.requests.clone()
    if masked:
        requests[0] = -1
    agree(
        input_batch.post_update, requests, b.computed, b.integers(0, 500, (REQUESTS, 1)),
        b.integers(0, 9, (REQUESTS, 500)).int() if counted else None, sampled,
        torch.minimum(b.integers(0, 6, b.size), b.logits).int(), b.integers(0, 3, b.size).int(),
        b.starts if started else None, b.all_tokens, b.integers(0, LONGEST - 6, REQUESTS).int(),
    )  # fmt: skip


@examples
@given(batches)
def test_post_update_num_computed_tokens(b):
    agree(input_batch.post_update_num_computed_tokens, b.requests, b.computed, b.starts)


@examples
@given(batches)
def test_expand_idx_mapping(b):
    agree(input_batch.expand_idx_mapping, b.requests, int(b.cu_logits[-1]), b.cu_logits, 5)


@examples
@given(batches, st.booleans())
def test_gather_draft_sampled(b, dummy):
    expanded, local = input_batch.expand_idx_mapping(b.requests, int(b.cu_logits[-1]), b.cu_logits, 5)
    agree(
        rejection_sampler.gather_draft_sampled, b.integers(0, 500, MOST_TOKENS).int(),
        b.integers(0, LONGEST, MOST_TOKENS), b.integers(0, MOST_TOKENS, len(expanded)), expanded, local, b.prefill_len,
    )  # fmt: skip


@examples
@given(batches)
def test_flatten_sampled(b):
    def flatten(sampled, num_sampled, cu_logits):
        flat = torch.zeros(int(cu_logits[-1]), dtype=torch.int64)
        rejection_sampler._flatten_sampled_kernel[(len(num_sampled),)](
            flat, sampled, sampled.stride(0), num_sampled, cu_logits, num_warps=1
        )
        return flat

    counts = torch.minimum(b.integers(0, 6, b.size), b.logits).int()
    agree(flatten, b.integers(0, 500, (b.size, 6)), counts, b.cu_logits, on=(rejection_sampler,))


@examples
@given(batches, st.booleans())
def test_draft_prefill_inputs(b, column):
    rejected = torch.minimum(b.integers(0, 4, b.size), b.lens - 1).int()
    buffers = SimpleNamespace(
        input_ids=b.garbage(MOST_TOKENS), positions=b.garbage(MOST_TOKENS, torch.int64),
        query_start_loc=b.garbage(REQUESTS + 1), seq_lens=b.garbage(REQUESTS),
    )  # fmt: skip
    batch = SimpleNamespace(
        num_reqs=b.size, input_ids=b.integers(0, 500, b.tokens).int(), positions=b.integers(0, LONGEST, b.tokens),
        idx_mapping=b.requests, query_start_loc=b.starts, seq_lens=b.seq_lens,
    )  # fmt: skip
    shape = (REQUESTS, 1) if column else (REQUESTS,)
    agree(
        speculator.prepare_prefill_inputs, b.garbage(REQUESTS, torch.int64), torch.tensor(5), buffers, batch,
        b.integers(0, 2, b.size).int(), rejected, b.integers(0, 500, shape), b.integers(0, 500, REQUESTS).int(),
        REQUESTS,
    )  # fmt: skip


@examples
@given(batches, st.booleans(), st.sampled_from([LONGEST, 40]))
def test_draft_decode_inputs(b, advance, longest):
    buffers = SimpleNamespace(
        input_ids=b.garbage(MOST_TOKENS), positions=b.integers(0, longest, MOST_TOKENS),
        query_start_loc=b.garbage(REQUESTS + 1), seq_lens=b.garbage(REQUESTS),
    )  # fmt: skip
    agree(
        speculator.prepare_decode_inputs, b.integers(0, 500, (b.size, 4))[:, 0], b.seq_lens,
        b.integers(0, 3, b.size).int(), buffers, b.integers(0, LONGEST, REQUESTS), longest, REQUESTS, advance,
    )  # fmt: skip


@examples
@given(batches, st.booleans(), st.integers(0, 3), st.sampled_from([LONGEST, 40]))
def test_update_draft_inputs(b, advance, step, longest):
    buffers = SimpleNamespace(
        input_ids=b.garbage(MOST_TOKENS), positions=b.integers(0, longest, MOST_TOKENS),
        seq_lens=b.integers(1, longest + 1, REQUESTS).int(),
    )  # fmt: skip
    states = torch.randn(b.size, 37, generator=b.g)
    agree(
        speculator.update_draft_inputs, b.integers(0, 500, b.size), torch.tensor(step), states,
        b.garbage((REQUESTS, 4), torch.int64), torch.full((MOST_TOKENS, 37), torch.nan), buffers,
        b.integers(0, LONGEST, REQUESTS), b.size, longest, 4, advance,
    )  # fmt: skip


def write_staged(shape, dtype, writes):
    tensor = buffer_utils.StagedWriteTensor(shape, dtype=dtype, device=torch.device("cpu"))
    tensor.gpu.fill_(-1)
    for row, start, values in writes:
        tensor.stage_write(row, start, values)
    tensor.apply_write()
    return tensor.gpu


@examples
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 6), st.lists(st.integers(0, 99), max_size=5)), max_size=9
    )
)
def test_staged_writes(writes):
    for dtype in (torch.int32, torch.int64, torch.float32):
        agree(write_staged, (5, 12), dtype, writes, on=(buffer_utils,))
    agree(
        write_staged,
        12,
        torch.int32,
        [(start, 0, values[:1]) for _, start, values in writes],
        on=(buffer_utils,),
    )


def tables(block_sizes, enabled, native):
    """BlockTables of several groups, with a step's tables and slots. The kernels get their addresses."""
    modules = {block_table, buffer_utils}
    groups = len(block_sizes)
    made = block_table.BlockTables(
        block_sizes, REQUESTS, MOST_TOKENS, [-(-LONGEST // size) for size in block_sizes], torch.device("cpu"),
        slot_mapping_enabled=enabled,
    )  # fmt: skip

    def step(b):
        made.slot_mappings.fill_(-5)
        for request in b.requests.tolist():
            blocks = tuple(b.integers(0, 1000, -(-LONGEST // size)).tolist() for size in block_sizes)
            made.append_block_ids(request, blocks, overwrite=True)
        made.apply_staged_writes()
        gathered = made.gather_block_tables(b.requests, num_reqs_padded=b.size)
        requests = b.requests.clone()
        if b.size > 2:
            requests[1] = -1  # a dummy request
        positions = b.integers(0, LONGEST, b.tokens)
        slots = made.compute_slot_mappings(requests, b.starts, positions, MOST_TOKENS)
        assert len(gathered) == groups
        return (
            [made.block_tables[i].gpu for i in range(groups)],
            [table.clone() for table in gathered],
            slots.clone(),
        )

    def run(b):
        if not native:
            return step(b)
        with replaced(modules):
            return step(b)

    return run


@pytest.mark.parametrize(("block_sizes", "enabled"), [([16], [True]), ([16, 5, 48], [True, False, True])])
def test_block_tables(block_sizes, enabled):
    steps = [tables(block_sizes, enabled, native) for native in (False, True)]
    for seed in range(6):
        found = [run(Batch(seed, 1 + seed)) for run in steps]
        for left, right in zip(*found, strict=True):
            for a, c in zip(left, right, strict=True):
                same(a, c)
