"""The second part of the ledger: the classes that override parts of vLLM's classes.

`tests/runner/test_ledger.py` walks the package and fails on an override that is not listed here.
"""

from vllm_eagle3.runner.draw_overrides import DRAW_SUBCLASSES, REJECTION_SAMPLER, SET_ATTN
from vllm_eagle3.runner.serving_overrides import SERVING_SUBCLASSES, methods
from vllm_eagle3.runner.upstream import Subclass, UpstreamSignature

_SCHEDULER = "vllm.v1.core.sched"
_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator"
_AUTOREGRESSIVE = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
_MODEL_STATES = "vllm.v1.worker.gpu.model_states"
_CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
_TRITON_ATTENTION = "vllm.v1.attention.backends.triton_attn"
_FLASH_ATTENTION = "vllm.v1.attention.backends.flash_attn"

_NO_HOOK = "vLLM lets a plugin choose the number of drafts of a step"
_NO_REGISTRY = "vLLM has a registry of proposers (vllm-project/vllm#36219)"
_NO_TREES = "vLLM verifies draft trees"


def _draft(name: str, module: str, stock: str) -> Subclass:
    return Subclass(
        f"vllm_eagle3.model.draft:{name}",
        methods(
            f"vllm.model_executor.models.{module}",
            stock,
            __init__="self, vllm_config, prefix",
            load_weights="self, weights",
            combine_hidden_states="self, hidden_states",
        )
        + methods(
            "vllm.model_executor.models.interfaces",
            "LocalArgmaxMixin",
            get_top_tokens="self, hidden_states",
        ),
        reason="loads every dialect, fuses states without a copy, and drafts in the draft's own vocabulary",
        remove_when="vLLM's EAGLE-3 model does all three",
    )


_SPECULATOR_PROPOSE = methods(
    _AUTOREGRESSIVE,
    "TargetDependentARSpeculator",
    propose="self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, "
    "num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, dp_sync_state, dummy_run, "
    "skip_attn_for_dummy_run, mm_inputs, is_profile, num_speculative_tokens",
)
_SAMPLE_DRAFT = UpstreamSignature(
    _SPECULATOR,
    "DraftModelSpeculator.sample_draft",
    "self, hidden_states, sample_src_positions, idx_mapping, temperature, seeds, draft_step, draft_logits, "
    "spec_step_idx",
    also=(
        "self, hidden_states, sample_src_positions, idx_mapping, temperature, seeds, draft_step, draft_logits, "
        "spec_step_idx, num_steps",  # 0.33
    ),
)
_ATTENTION_FORWARD = (
    "self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale"
)

SUBCLASSES = (
    *SERVING_SUBCLASSES,
    *DRAW_SUBCLASSES,
    Subclass(
        "vllm_eagle3.runner.hooks.input_processor:Eagle3InputProcessor",
        methods(
            "vllm.v1.engine.input_processor",
            "InputProcessor",
            __init__="self, vllm_config, renderer, mm_registry",
            _validate_params="self, params, supported_tasks",
        ),
        reason="upstream refuses min_p and logit_bias while speculating; the V2 runner applies them correctly. And a "
        "request's limit of drafts is checked",
        remove_when="upstream refuses them on the V1 runner only",
    ),
    Subclass(
        "vllm_eagle3.runner.policy_scheduler:PolicyMixin",
        methods(
            f"{_SCHEDULER}.scheduler",
            "Scheduler",
            __init__="self, vllm_config, kv_cache_config, structured_output_manager, block_size, hash_block_size, "
            "mm_registry, include_finished_set, log_stats",
            add_request="self, request",
            update_from_output="self, scheduler_output, model_runner_output",
            shutdown="self",
        ),
        reason="the policy learns from every step, and chooses how much to draft in the next one",
        remove_when=_NO_HOOK,
    ),
    Subclass(
        "vllm_eagle3.runner.policy_scheduler:AsyncDraftScheduler",
        methods(
            f"{_SCHEDULER}.async_scheduler",
            "AsyncScheduler",
            _update_after_schedule="self, scheduler_output",
        ),
        reason="with asynchronous scheduling, drafts are placeholders that have to be cut before they are known",
        remove_when=_NO_HOOK,
    ),
    Subclass(
        "vllm_eagle3.runner.v1.greedy_rejection_sampler:GreedyRejectionSampler",
        methods(
            "vllm.v1.sample.rejection_sampler",
            "RejectionSampler",
            forward="self, metadata, draft_probs, logits, sampling_metadata",
        ),
        reason="upstream copies all logits three times before it takes the argmax of greedy requests",
        remove_when="upstream takes the argmax of greedy rows directly",
    ),
    Subclass(
        "vllm_eagle3.runner.v1.proposer:Eagle3Proposer",
        methods("vllm.v1.spec_decode.eagle", "EagleProposer", __init__="self, vllm_config, device, runner")
        + methods(
            _PROPOSER,
            "SpecDecodeBaseProposer",
            propose="self, num_speculative_tokens, target_token_ids, target_positions, target_hidden_states, "
            "next_token_ids, token_indices_to_sample, common_attn_metadata, sampling_metadata, mm_embed_inputs, "
            "num_rejected_tokens_gpu, slot_mappings",
            _greedy_sample="self, hidden_states",
            _sample_draft_tokens="self, hidden_states, sampling_metadata",
            dummy_run="self, num_tokens, use_cudagraphs, is_graph_capturing, slot_mappings",
            load_model="self, target_model",
        ),
        reason="on a CPU one step over the drafting rows is faster than vLLM's padded loop",
        remove_when=f"{_NO_REGISTRY}, or the V1 runner is gone",
    ),
    _draft("Eagle3LlamaDraft", "llama_eagle3", "Eagle3LlamaForCausalLM"),
    _draft("Eagle3Qwen3Draft", "qwen3_eagle3", "Eagle3Qwen3ForCausalLM"),
    Subclass(
        "vllm_eagle3.runner.v2.speculator:Eagle3Speculator",
        (
            *methods(_AUTOREGRESSIVE, "TargetDependentARSpeculator", load_model="self, target_model"),
            *_SPECULATOR_PROPOSE,
            _SAMPLE_DRAFT,
            *methods(
                _SPECULATOR,
                "DraftModelSpeculator",
                get_draft_top_tokens="self, hidden_states, spec_step_idx",
            ),
        ),
        reason="states are fused without a copy, and drafts are sampled in the draft's own vocabulary",
        remove_when=_NO_REGISTRY,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.cpu_speculator:CPUSpeculator",
        (
            *methods(_AUTOREGRESSIVE, "TargetDependentARSpeculator", __init__="self, vllm_config, device"),
            *methods(_AUTOREGRESSIVE, "TargetDependentARSpeculator", load_model="self, target_model"),
            SET_ATTN,
            *_SPECULATOR_PROPOSE,
        ),
        reason="on a CPU one step over the drafting rows is faster than vLLM's padded and compiled forward pass",
        remove_when=_NO_REGISTRY,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.cpu_speculator:StoppedChains",
        methods(
            "vllm.v1.worker.gpu.spec_decode.utils",
            "DraftTokensHandler",
            set_draft_tokens="self, input_batch, draft_tokens",
            get_draft_tokens="self",
        ),
        reason="the scheduler has to know of chains that stopped early",
        remove_when="a speculator can say how many drafts it made for each request",
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_speculator:TreeSpeculator",
        (
            *methods(
                _AUTOREGRESSIVE,
                "TargetDependentARSpeculator",
                __init__="self, vllm_config, device",
                load_model="self, target_model",
                init_cudagraph_manager="self, cudagraph_mode",
                capture="self",
            ),
            SET_ATTN,
            *_SPECULATOR_PROPOSE,
            _SAMPLE_DRAFT,
        ),
        reason="grows a tree after upstream's first draft step",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.cpu_tree_speculator:CPUTreeSpeculator",
        (
            *methods(_AUTOREGRESSIVE, "TargetDependentARSpeculator", __init__="self, vllm_config, device"),
            SET_ATTN,
        ),
        reason="on a CPU the trees' steps are those of CPUSpeculator",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_model_state:TreeModelState",
        methods(
            f"{_MODEL_STATES}.default",
            "DefaultModelState",
            __init__="self, vllm_config, model, encoder_cache, device",
            add_request="self, req_index, new_req_data",
            prepare_attn="self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, "
            "kv_cache_config, for_capture, ubatch_idx, model_specific_attn_metadata",
            prepare_inputs="self, input_batch, req_states",
            prepare_dummy_inputs="self, num_reqs, num_tokens",
        )
        + methods(
            f"{_MODEL_STATES}.interface",
            "ModelState",
            initialize_kv_cache="self, kv_cache_config, block_tables",
            custom_sampler="self, sampler",
            postprocess_state="self, idx_mapping, num_sampled, num_computed_tokens",
        ),
        reason="the target sees tree positions and masks, and the KV of the accepted path has to be moved",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_rejection_sampler:TreeRejectionSampler",
        REJECTION_SAMPLER,
        reason="upstream verifies chains",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_attention:TreeCPUAttentionBackend",
        methods(_CPU_ATTENTION, "CPUAttentionBackend", get_impl_cls=""),
        reason="vLLM's CPU attention knows causal masks only, and its platform has no second backend to select",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_attention:TreeCPUAttentionImpl",
        methods(
            _CPU_ATTENTION,
            "CPUAttentionBackendImpl",
            __init__="self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, "
            "kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks",
            forward=_ATTENTION_FORWARD,
        ),
        reason="vLLM's CPU attention knows causal masks only",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_attention:TreeTritonAttentionBackend",
        methods(_TRITON_ATTENTION, "TritonAttentionBackend", get_name="", get_impl_cls=""),
        reason="vLLM's Triton attention knows causal masks only",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_attention:TreeTritonAttentionImpl",
        methods(
            _TRITON_ATTENTION,
            "TritonAttentionImpl",
            __init__="self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, "
            "kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks, use_alibi_sqrt, "
            "chunk_lookback",
            fused_output_quant_supported="self, quant_key",
            forward=_ATTENTION_FORWARD,
        ),
        reason="vLLM's Triton attention knows causal masks only",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_flash_attention:TreeFlashAttentionBackend",
        methods(_FLASH_ATTENTION, "FlashAttentionBackend", get_name="", get_impl_cls="", get_builder_cls=""),
        reason="FlashAttention knows causal masks only",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_flash_attention:TreeFlashAttentionBuilder",
        methods(
            _FLASH_ATTENTION,
            "FlashAttentionMetadataBuilder",
            get_cudagraph_support="cls, vllm_config, kv_cache_spec",
        ),
        reason="which rows verify trees changes from one mixed batch to the next, and a CUDA graph would keep it",
        remove_when=_NO_TREES,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.tree_flash_attention:TreeFlashAttentionImpl",
        methods(
            _FLASH_ATTENTION,
            "FlashAttentionImpl",
            __init__="self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, "
            "kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, sinks",
            forward=_ATTENTION_FORWARD,
        ),
        reason="FlashAttention knows causal masks only",
        remove_when=_NO_TREES,
    ),
)
