"""The part of the ledger about Triton's interpreter, which replaces a GPU in tests: see `triton_interpreter`."""

from vllm_eagle3.runner.upstream import ModuleChange, UpstreamSignature

_INTERPRETER = "vllm_eagle3.runner.triton_interpreter"
_REJECTION_UTILS = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"
_STATS_PARAMETERS = (
    "target_local_argmax_ptr, target_local_argmax_stride, target_local_max_ptr, "
    "target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride, draft_local_max_ptr, "
    "draft_local_max_stride, draft_local_sumexp_ptr, draft_local_sumexp_stride, target_logits_ptr, "
    "target_logits_stride, draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1, "
    "expanded_idx_mapping_ptr, expanded_local_pos_ptr, temp_ptr, vocab_size, {}, "
    "BLOCK_SIZE, HAS_DRAFT_LOGITS"
)

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
                _STATS_PARAMETERS.format("num_speculative_steps"),
                also=(_STATS_PARAMETERS.format("num_logits"),),  # vLLM 0.33
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
