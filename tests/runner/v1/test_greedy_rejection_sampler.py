"""The greedy rejection sampler gives upstream's tokens, and calls upstream for all but plain argmax (2 s)."""

from dataclasses import replace

import pytest
import torch
from vllm.config import VllmConfig
from vllm.utils.cpu_triton_utils import _rejection_greedy_sample_kernel_impl
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_eagle3.runner.v1.greedy_rejection_sampler import GreedyRejectionSampler, argmax_decides

CPU = torch.device("cpu")
VOCAB = 96


def greedy(batch, processors=()):
    return SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(batch),
        presence_penalties=torch.zeros(batch),
        repetition_penalties=torch.ones(batch),
        output_token_ids=[[] for _ in range(batch)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(processors),
    )


def step(drafts):
    """Metadata of a step that verifies these drafts, and the request and position of each row of its logits."""
    metadata = SpecDecodeMetadata.make_dummy(drafts, CPU)
    ends = metadata.cu_num_sampled_tokens.tolist()
    metadata.bonus_logits_indices = torch.tensor([end - 1 for end in ends], dtype=torch.int32)
    rows = set(range(ends[-1])) - {end - 1 for end in ends}
    metadata.target_logits_indices = torch.tensor(sorted(rows), dtype=torch.int32)
    return metadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_the_tokens_are_upstreams(dtype, seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (6,), generator=generator).tolist()
    lengths[seed % 6] = 4
    logits = torch.randn(sum(lengths) + 6, VOCAB, generator=generator).to(dtype)
    best, drafts, at = logits.argmax(-1), [], 0
    for length in lengths:  # right two times in three
        right = torch.rand(length, generator=generator) < 0.67
        own = best[at : at + length]
        drafts.append(torch.where(right, own, (own + 1) % VOCAB).tolist())
        at += length + 1
    metadata = step(drafts)
    upstream, greedy_sampler = RejectionSampler(Sampler()), GreedyRejectionSampler(Sampler())
    monkeypatch.setattr(rejection_sampler, "_rejection_greedy_sample", _rejection_greedy_sample_kernel_impl)
    expected = upstream(metadata, None, logits.clone(), greedy(6)).sampled_token_ids
    monkeypatch.setattr(RejectionSampler, "forward", None)  # upstream must not be called
    output = greedy_sampler(metadata, None, logits, greedy(6))
    assert torch.equal(output.sampled_token_ids, expected)
    assert output.sampled_token_ids.dtype == expected.dtype and output.logprobs_tensors is None


def test_requests_whose_logits_are_altered_go_to_upstream():
    config = VllmConfig()
    least, bias = (cls(config, CPU, False) for cls in (MinTokensLogitsProcessor, LogitBiasLogitsProcessor))
    plain = greedy(2, [least, bias])
    assert argmax_decides(plain)
    altered = {
        "all_greedy": False,
        "max_num_logprobs": 0,
        "logprob_token_ids": {0: [1]},
        "no_penalties": False,
        "allowed_token_ids_mask": torch.zeros(2, VOCAB, dtype=torch.bool),
        "bad_words_token_ids": {0: [[3]]},
    }
    for name, value in altered.items():
        assert not argmax_decides(replace(plain, **{name: value})), name
    least.min_toks = {0: (4, [], {2}, False)}
    assert not argmax_decides(plain)
    least.min_toks, bias.biases = {}, {0: {5: 1.0}}
    assert not argmax_decides(plain)

    class Other(MinTokensLogitsProcessor):
        """Somebody's own."""

    assert not argmax_decides(greedy(2, [Other(config, CPU, False)]))


def test_synthetic_acceptance_goes_to_upstream(monkeypatch):
    sampler = GreedyRejectionSampler(Sampler())
    sampler.synthetic_mode = True
    monkeypatch.setattr(RejectionSampler, "forward", lambda *args: "upstream")
    assert sampler.forward(step([[1]]), None, torch.zeros(2, VOCAB), greedy(1)) == "upstream"
