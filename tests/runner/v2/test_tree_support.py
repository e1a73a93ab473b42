"""Settings that trees refuse at start-up, and requests that get a chain instead of a tree (3 s)."""

from types import SimpleNamespace as Config

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_eagle3.config import Eagle3Options, TreeOptions
from vllm_eagle3.runner.v2.tree_limits import may_draw, needs_chain, refuse_unsupported

TREE = Eagle3Options(tree=TreeOptions(4, 3, 12), graft=False)


def engine_config(**changes):
    """A VllmConfig with only the attributes that are read. Keys of `changes` are "part__attribute"."""
    config = Config(
        parallel_config=Config(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            enable_batch_sharded_sampling=None,
        ),
        speculative_config=Config(
            enable_adaptive_verification=False,
            draft_sample_method="greedy",
            rejection_sample_method="standard",
            parallel_drafting=False,
            num_speculative_tokens=12,
            kv_cache_dtype=None,
            attention_backend=None,
        ),
        attention_config=Config(backend_per_kind={}),
        model_config=Config(
            get_sliding_window=lambda: None,
            uses_mrope=False,
            supports_multimodal_inputs=False,
            use_mla=False,
            is_hybrid=False,
            is_attention_free=False,
            logits_processors=None,
            dtype=torch.bfloat16,
        ),
        cache_config=Config(cache_dtype="auto", kv_sharing_fast_prefill=False),
        lora_config=None,
        kv_transfer_config=None,
        watermark_config=None,
    )
    for name, value in changes.items():
        part, _, attribute = name.rpartition("__")
        setattr(getattr(config, part) if part else config, attribute, value)
    return config


def test_a_plain_engine_is_served():
    refuse_unsupported(engine_config(), TREE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
        ({"lora_config": object()}, "LoRA"),
        ({"model_config__uses_mrope": True}, "M-RoPE"),
        ({"model_config__supports_multimodal_inputs": True}, "multimodal inputs"),
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__is_hybrid": True}, "Mamba"),
        ({"model_config__get_sliding_window": lambda: 4}, "sliding window of 4 tokens"),
        ({"speculative_config__enable_adaptive_verification": True}, "adaptive verification"),
        ({"speculative_config__draft_sample_method": "probabilistic"}, "'probabilistic'"),
        ({"speculative_config__rejection_sample_method": "block"}, "'block'"),
        ({"cache_config__cache_dtype": "fp8"}, "KV cache of type fp8"),
        ({"cache_config__cache_dtype": "float16"}, "type float16 beside a model of type torch.bfloat16"),
        ({"speculative_config__kv_cache_dtype": "fp8"}, "speculative_config.kv_cache_dtype"),
        ({"speculative_config__attention_backend": "FLASH_ATTN"}, "speculative_config.attention_backend"),
        ({"attention_config__backend_per_kind": {"full": "FLASH_ATTN"}}, "backend_per_kind"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"watermark_config": object()}, "watermarking"),
        (
            {"speculative_config__num_speculative_tokens": 11},
            r"expected 12 \(the tree's nodes\) to 62, .* found 11",
        ),
    ],
)
def test_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        refuse_unsupported(engine_config(**change), TREE)


def test_a_graft_may_be_deeper_than_the_window():
    config = engine_config(model_config__get_sliding_window=lambda: 8)
    refuse_unsupported(config, TREE)
    with pytest.raises(ValueError, match="window of 8 tokens with trees of depth 8"):
        refuse_unsupported(config, Eagle3Options(tree=TreeOptions(4, 3, 12)))


def test_all_that_does_not_fit_is_named_at_once():
    config = engine_config(lora_config=object(), model_config__uses_mrope=True)
    with pytest.raises(ValueError, match=r"LoRA, M-RoPE; leave out the option 'tree'"):
        refuse_unsupported(config, TREE)


def test_more_nodes_than_candidates():
    with pytest.raises(ValueError, match="at most 4 nodes"):
        refuse_unsupported(engine_config(), Eagle3Options(tree=TreeOptions(4, 1, 12)))


@pytest.mark.parametrize(
    ("params", "chain"),
    [
        ({}, False),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "logit_bias": {3: 1.0}}, False),
        ({"min_tokens": 4, "logprobs": 2, "stop_token_ids": [3]}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"bad_words": ["no"]}, True),
        ({"structured_outputs": StructuredOutputsParams(regex="a*")}, True),
    ],
)
def test_requests_that_need_a_chain(params, chain):
    assert needs_chain(SamplingParams(**params), Config(logits_processors=None)) is chain


def test_custom_logits_processors_mean_chains():
    assert needs_chain(SamplingParams(), Config(logits_processors=["a.B"]))


def test_who_may_draw():
    """A grammar drops drafts by their tokens, and a seed determines the text."""
    assert may_draw(SamplingParams(temperature=0.7))
    grammar = StructuredOutputsParams(json={"type": "object"})
    for fixed in ({"temperature": 0}, {"seed": 3}, {"structured_outputs": grammar}):
        assert not may_draw(SamplingParams(**{"temperature": 0.7, **fixed}))
    assert not may_draw(None)
