"""What draft trees do not support: settings are refused at start-up, requests are served with a chain."""

from typing import Any

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.tree.growth import candidates

PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")
USE_A_CHAIN = "leave out the option 'tree' to draft a chain"


def refuse_unsupported(vllm_config: Any, options: Eagle3Options) -> None:
    """Raise ValueError, which names every setting of this engine that draft trees do not support."""
    tree, deepest = options.tree, options.deepest
    assert tree is not None
    parallel, spec, model = (
        vllm_config.parallel_config,
        vllm_config.speculative_config,
        vllm_config.model_config,
    )
    cache, windows = vllm_config.cache_config, model.get_sliding_window()
    unsupported = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.enable_dbo,
        "batch-sharded sampling": parallel.enable_batch_sharded_sampling,
        "LoRA": vllm_config.lora_config is not None,
        "M-RoPE": model.uses_mrope,
        "multimodal inputs": model.supports_multimodal_inputs,
        "MLA": model.use_mla,
        "recurrent or hybrid layers (Mamba)": model.is_hybrid or model.is_attention_free,
        f"a sliding window of {windows} tokens with trees of depth {deepest}": bool(windows)
        and windows <= deepest,
        "adaptive verification": spec.enable_adaptive_verification,
        "draft_sample_method 'probabilistic'": spec.draft_sample_method == "probabilistic",
        f"rejection_sample_method {spec.rejection_sample_method!r}": spec.rejection_sample_method
        != "standard",
        "parallel drafting": spec.parallel_drafting,
        f"a KV cache of type {cache.cache_dtype}": cache.cache_dtype not in PLAIN_CACHES,
        f"a KV cache of type {cache.cache_dtype} beside a model of type {model.dtype}": cache.cache_dtype
        in PLAIN_CACHES[1:]
        and cache.cache_dtype != str(model.dtype).removeprefix("torch."),
        "speculative_config.kv_cache_dtype": spec.kv_cache_dtype is not None,
        "speculative_config.attention_backend": spec.attention_backend is not None,
        "attention_config.backend_per_kind": bool(vllm_config.attention_config.backend_per_kind),
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "fast prefill by KV sharing": cache.kv_sharing_fast_prefill,
        "watermarking": getattr(vllm_config, "watermark_config", None) is not None,
    }
    found = [name for name, present in unsupported.items() if present]
    if found:
        raise ValueError(f"draft trees do not support {', '.join(found)}; {USE_A_CHAIN}")
    if not tree.nodes <= spec.num_speculative_tokens <= 62:
        raise ValueError(
            f"num_speculative_tokens: expected {tree.nodes} (the tree's nodes) to 62, because the scheduler reserves "
            f"room for that many drafts, found {spec.num_speculative_tokens}"
        )
    most = candidates(tree.depth, tree.topk)
    if tree.nodes > most:
        raise ValueError(
            f"a tree of depth {tree.depth} and topk {tree.topk} has at most {most} nodes, "
            f"found nodes = {tree.nodes}"
        )


def needs_chain(params: Any, model_config: Any) -> bool:
    """Whether a request's sampling depends on the tokens before each row, so that it cannot have a tree.

    vLLM applies these parameters as if each row followed the row before it. That is true only in a chain.
    """
    return params is not None and bool(
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.bad_words
        or params.structured_outputs is not None
        or params.thinking_token_budget is not None
        or model_config.logits_processors
    )


def may_draw(params: Any) -> bool:
    """Whether a request's drafts may be drawn: it samples, has no seed that determines its text, and no grammar.

    The scheduler drops the drafts that a grammar refuses, so that those verified depend on the tokens drawn.
    """
    return (
        params is not None
        and params.temperature > 0
        and params.seed is None
        and params.structured_outputs is None
    )
