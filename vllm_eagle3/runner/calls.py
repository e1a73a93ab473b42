"""The part of the ledger about what this project calls: functions of vLLM whose parameters it relies on."""

from vllm_eagle3.runner.upstream import UpstreamSignature

_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_BLOCK_TABLES = "vllm.v1.worker.gpu.block_table"
_CPU_RESOURCES = "vllm.utils.cpu_resource_utils"
CALLED = (
    # How much memory is free.
    UpstreamSignature(_CPU_RESOURCES, "get_allowed_cpu_list", ""),
    UpstreamSignature(_CPU_RESOURCES, "get_visible_memory_node", "", also=("assigned_node_ids",)),
    UpstreamSignature(_CPU_RESOURCES, "get_memory_node_info", "node_id"),
    # Attributes that are set on an upstream object.
    UpstreamSignature("vllm.v1.core.sched.scheduler", "Scheduler.dynamic_sd_lookup", "list[int] | None"),
    UpstreamSignature(
        "vllm.v1.engine.input_processor",
        "InputProcessor.speculative_config",
        "vllm_config.speculative_config",
    ),
    # The V1 runner.
    UpstreamSignature(
        _PROPOSER,
        "SpecDecodeBaseProposer._update_positions_dependent_metadata",
        "self, positions, common_attn_metadata, batch_size, input_batch_size, block_size",
    ),
    UpstreamSignature(
        _PROPOSER,
        "SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata",
        "self, common_attn_metadata, draft_index",
    ),
    UpstreamSignature(
        _PROPOSER, "compute_probs_and_sample_next_token", "logits, sampling_metadata, use_fp64_gumbel"
    ),
    # The V2 runner: trees.
    UpstreamSignature("vllm.v1.worker.gpu.model_states", "resolve_model_state_cls", "vllm_config, model"),
    UpstreamSignature(
        _GRAPHS,
        "CudaGraphManager.__init__",
        "self, vllm_config, device, cudagraph_mode, decode_query_len, lora_capture_cases, varlen_decode, ubatch_runner",
    ),
    UpstreamSignature(_GRAPHS, "CudaGraphManager.capture", "self, create_forward_fn, progress_bar_desc"),
    UpstreamSignature(
        _GRAPHS,
        "CudaGraphManager.dispatch",
        "self, num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len, num_ubatches",
    ),
    UpstreamSignature(_GRAPHS, "CudaGraphManager.run_fullgraph", "self, desc"),
    UpstreamSignature(_BLOCK_TABLES, "BlockTables.get_dummy_block_tables", "self, num_reqs"),
    UpstreamSignature(
        _BLOCK_TABLES,
        "BlockTables.compute_slot_mappings",
        "self, idx_mapping, query_start_loc, positions, num_tokens_padded, out",
    ),
    UpstreamSignature(
        "vllm.v1.worker.gpu.sample.sampler",
        "Sampler.apply_sampling_params",
        "self, logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, expanded_local_pos, "
        "seq_lens_upper_bound_np, skip_top_k_top_p",
    ),
    UpstreamSignature(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        "self, layer, key, value, kv_cache, slot_mapping",
    ),
    # The V2 runner: dummy steps, timed.
    UpstreamSignature("vllm.v1.worker.gpu.async_utils", "StepTimingCollector.collect", "self"),
    UpstreamSignature("vllm.v1.worker.gpu.async_utils", "StepTimingSample.forward_ms", "float"),
    UpstreamSignature("vllm.v1.worker.gpu.async_utils", "StepTimingSample.drafter_ms", "float"),
    UpstreamSignature("vllm.v1.worker.gpu.async_utils", "StepTimingSample.num_target_tokens", "int"),
    UpstreamSignature("vllm.v1.worker.gpu.async_utils", "StepTimingSample.num_reqs", "int"),
    # The V2 runner: chains on a CPU.
    UpstreamSignature(
        "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator",
        "prepare_prefill_inputs",
        "last_token_indices, current_draft_step, input_buffers, input_batch, num_sampled, num_rejected, "
        "last_sampled, next_prefill_tokens, max_num_reqs",
    ),
    UpstreamSignature(
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "DraftModelSpeculator._build_uniform_attn_metadata",
        "self, batch_desc, num_reqs, num_query_per_req, seq_lens_cpu_upper_bound, step, causal, dcp_local_seq_lens",
    ),
    UpstreamSignature(
        "vllm.v1.worker.gpu.sample.gumbel",
        "gumbel_sample",
        "logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature, is_drafting, logits_cache, "
        "logits_cache_col, use_fp64, logits_cache_source",
    ),
)
"""Parts of vLLM that this project calls with positional arguments, or assigns to."""
