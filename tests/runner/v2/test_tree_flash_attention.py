"""Trees on FlashAttention emulated in torch: one layer compared with a dense mask, and a whole engine (1 min)."""

import random
from types import SimpleNamespace

import flash_on_cpu
import numpy as np
import pytest
import torch
from engines import running, speculative, token_ids
from random_llama import write_draft, write_target
from tree_oracle import oracle
from vllm import SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_eagle3.kernels import ancestor_bits, tree_attention
from vllm_eagle3.runner.v2 import select_attention
from vllm_eagle3.runner.v2 import tree_attention as backends
from vllm_eagle3.runner.v2 import tree_flash_attention as flash
from vllm_eagle3.tree.mask import TreeMask

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 16


def make_batch(requests):
    """(query, cache, metadata, mask, prefix_lens, scheduled, drafts) for (tokens before, rows, drafts) per request.

    Cache rows past a request's last hold NaN.
    """
    torch.manual_seed(0)
    rows = np.array([n for _, n, _ in requests])
    drafts = np.array([d for _, _, d in requests])
    ends = torch.tensor(np.cumsum(rows))
    lens = torch.tensor([before + n for before, n, _ in requests])
    blocks = -(-int(lens.max()) // BLOCK)
    cache = torch.randn(len(requests) * blocks, KV_HEADS, BLOCK, 2 * DIM)
    table = torch.randperm(len(cache)).view(len(requests), blocks).int()
    for row, length in zip(table, lens.tolist(), strict=True):
        for slot in range(length, blocks * BLOCK):
            cache[row[slot // BLOCK].long(), :, slot % BLOCK] = float("nan")
    linear = torch.cat([torch.arange(before, before + n) for before, n, _ in requests])
    mask = TreeMask(linear.clone(), torch.ones_like(linear), linear.clone())
    prefix_lens = torch.zeros(len(requests), dtype=torch.int32)
    for i, (before, n, d) in enumerate(requests):
        tree = slice(int(ends[i]) - d - 1, int(ends[i]))
        parents = torch.tensor([[-1, *(int(torch.randint(0, j, ())) for j in range(1, d + 1))]])
        depth, bits = ancestor_bits(parents)
        root = before + n - d - 1
        mask.root[tree], mask.bits[tree], mask.positions[tree] = root, bits[0], root + depth[0]
        prefix_lens[i] = root
    metadata = SimpleNamespace(
        num_actual_tokens=int(ends[-1]), max_query_len=int(rows.max()), max_seq_len=int(lens.max()),
        query_start_loc=torch.nn.functional.pad(ends, (1, 0)).int(), seq_lens=lens.int(), block_table=table,
        max_num_splits=0, scheduler_metadata=None, causal=True, mm_prefix_query_range_tensor=None,
        rswa_prefix_lens=None,
    )  # fmt: skip
    query = torch.randn(int(ends[-1]), HEADS, DIM)
    return query, cache, metadata, mask, prefix_lens, rows, drafts


BATCHES = {
    "trees only": [(30, 6, 5), (3, 6, 5), (64, 6, 5)],
    "trees and a request without drafts": [(30, 1, 0), (3, 6, 5)],
    "trees among prefills": [(0, 40, 0), (30, 6, 5), (5, 9, 0), (17, 4, 3), (9, 1, 0)],
    "prefills only": [(0, 20, 0), (7, 3, 0)],
}


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 12}, {"sinks": torch.randn(HEADS)}])
@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
def test_a_layer_against_the_dense_mask(monkeypatch, requests, options):
    if "sinks" in options and requests == BATCHES["prefills only"]:
        pytest.skip("the emulation has no sinks, and nothing of ours runs")
    flash_on_cpu.install(monkeypatch)
    window = options.get("window", 0)
    impl = flash.TreeFlashAttentionImpl(
        HEADS, DIM, 0.3, KV_HEADS, None, window or None, "auto", logits_soft_cap=options.get("softcap")
    )
    impl.sinks = options.get("sinks")
    impl.dcp_world_size = 1
    query, cache, metadata, mask, prefix_lens, scheduled, drafts = make_batch(requests)
    if drafts.any():
        metadata.tree = mask
        metadata.tree_rows = flash.tree_rows(metadata, mask, prefix_lens, scheduled, drafts)
    layer = SimpleNamespace(_q_scale=torch.ones(1), _k_scale=torch.ones(1), _v_scale=torch.ones(1))
    output = torch.full((len(query) + 2, HEADS, DIM), float("nan"))  # as padded for a CUDA graph
    impl.forward(layer, query, None, None, cache, metadata, output)
    expected = tree_attention(
        query, cache, metadata.block_table, metadata.query_start_loc, metadata.seq_lens, *mask,
        max_query_len=metadata.max_query_len, scale=0.3, **options,
    )  # fmt: skip
    torch.testing.assert_close(output[: len(query)], expected, atol=1e-5, rtol=1e-5)


def test_a_batch_that_only_decodes_is_taken_whole():
    """A CUDA graph must not depend on which requests have drafts."""
    _, _, metadata, mask, prefix_lens, scheduled, drafts = make_batch(
        BATCHES["trees and a request without drafts"]
    )
    whole = flash.tree_rows(metadata, mask, prefix_lens, scheduled, drafts)
    assert whole.rows is None
    assert whole.prefix_lens.data_ptr() == prefix_lens.data_ptr()
    captured = flash.tree_rows(metadata, mask, prefix_lens, scheduled, None)
    assert captured.rows is None


@pytest.mark.parametrize(
    ("asked", "fits", "found"),
    [
        (None, True, "TreeFlashAttentionBackend"),
        (None, False, "TreeTritonAttentionBackend"),
        ("TRITON_ATTN", True, "TreeTritonAttentionBackend"),
        ("FLASH_ATTN", True, "TreeFlashAttentionBackend"),
    ],
)
def test_backend_of_a_gpu(monkeypatch, asked, fits, found):
    monkeypatch.setattr(flash, "flash_attention_fits", lambda config: fits)
    backend = asked and AttentionBackendEnum[asked]
    config = SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
    assert select_attention.gpu_backend(config).endswith(f".{found}")


@pytest.mark.parametrize(("asked", "fits"), [("FLASHINFER", True), ("FLASH_ATTN", False)])
def test_other_backends_are_refused_by_name(monkeypatch, asked, fits):
    monkeypatch.setattr(flash, "flash_attention_fits", lambda config: fits)
    config = SimpleNamespace(attention_config=SimpleNamespace(backend=AttentionBackendEnum[asked]))
    with pytest.raises(ValueError, match=f"found {asked}"):
        select_attention.gpu_backend(config)


def test_an_engine_on_flash_attention(engine, tmp_path, monkeypatch):
    target, draft = write_target(tmp_path / "target"), write_draft(tmp_path / "draft")
    sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 64, "max_model_len": 256}
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    rng = random.Random(4)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (5, 70, 20)]
    with running(target, **sizes) as llm:
        expected = token_ids(llm, prompts, greedy)
    flash_on_cpu.install(monkeypatch)
    seen = set()

    class OnACPU(flash.TreeFlashAttentionBackend):
        """The backend under the name of the CPU's only backend, which the platform looks up."""

        @staticmethod
        def get_name():
            return "CPU_ATTN"

    def counted(*args, **kwargs):
        trees = original(*args, **kwargs)
        seen.add("whole batch" if trees.rows is None else "part of a batch")
        return trees

    original = flash.tree_rows
    monkeypatch.setattr("vllm_eagle3.runner.v2.tree_model_state.tree_rows", counted)
    monkeypatch.setattr(backends, "TreeCPUAttentionBackend", OnACPU)
    options = {"eagle3": {"policy": "fixed", "tree": {"depth": 4, "topk": 3, "nodes": 10}}}
    llm = engine(target, speculative_config=speculative(draft, 10), additional_config=options, **sizes)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    assert {type(layer.impl) for layer in layers} == {flash.TreeFlashAttentionImpl}
    with oracle([p + t for p, t in zip(prompts, expected, strict=True)], 512) as walked:
        assert token_ids(llm, prompts, greedy) == expected
    assert walked.accepted > 8
    assert seen == {"whole batch", "part of a batch"}
