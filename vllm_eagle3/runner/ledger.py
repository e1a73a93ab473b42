"""The ledger: every name of vLLM that this project replaces, and every upstream method it overrides.

Nothing of vLLM is imported here: a replacement is made when vLLM itself imports the module that holds the name.
"""

import ast
import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from vllm_eagle3.runner.hooks.after_import import after_import

logger = logging.getLogger("vllm.eagle3")


@dataclass(frozen=True)
class Seam:
    """A function of vLLM whose signature this project was written for."""

    defined_in: str
    """Module that defines it."""
    qualname: str
    """"function" or "Class.method"."""
    signature: str
    """Names of its parameters, in order."""
    also: tuple[str, ...] = ()
    """Other signatures that fit as well, in other supported versions."""

    def fits(self, vllm: Path) -> bool:
        """Whether the sources under `vllm` have a signature that fits."""
        return self.found(vllm) in (self.signature, *self.also)

    def found(self, vllm: Path) -> str | None:
        """The signature in the sources under `vllm` (the package's directory); None where there is no such name.

        Reads the source and imports nothing, so it also works on an unpacked wheel.
        """
        path = vllm.joinpath(*self.defined_in.split(".")[1:])
        path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if not path.is_file():
            return None
        node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
        for name in self.qualname.split("."):
            inner = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == name]
            if not inner:
                return None
            node = inner[0]
        assert isinstance(node, ast.FunctionDef)
        args = node.args
        return ", ".join(arg.arg for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs])


@dataclass(frozen=True)
class Patch:
    """One replaced name."""

    module: str
    """Module of vLLM in which the name is looked up."""
    name: str
    """"name" or "Class.method"."""
    replacement: str
    """"module:attribute" of what stands in for it."""
    seam: Seam
    """What is replaced; for a class, its `__init__`."""
    why: str
    until: str
    """When it can go."""

    def apply(self, module: ModuleType) -> None:
        target, attribute = self.replacement.split(":")
        owner, _, name = self.name.rpartition(".")
        setattr(
            getattr(module, owner) if owner else module,
            name,
            getattr(importlib.import_module(target), attribute),
        )
        logger.debug("vllm-eagle3: %s.%s is now %s", self.module, self.name, self.replacement)


LEDGER = (
    Patch(
        module="vllm.v1.worker.gpu_model_runner",
        name="EagleProposer",
        replacement="vllm_eagle3.runner.v1.proposer:Eagle3Proposer",
        seam=Seam(
            "vllm.v1.spec_decode.eagle",
            "EagleProposer.__init__",
            "self, vllm_config, device, runner",
        ),
        why="the V1 runner builds its proposers in a closed if/elif; this is the name it calls for eagle3",
        until="vLLM has a registry of proposers (vllm-project/vllm#36219), or the V1 runner is gone",
    ),
    Patch(
        module="vllm.v1.worker.gpu.model_runner",
        name="init_speculator",
        replacement="vllm_eagle3.runner.v2.init_speculator:init_speculator",
        seam=Seam(
            "vllm.v1.worker.gpu.spec_decode",
            "init_speculator",
            "vllm_config, device, req_states",
        ),
        why="the V2 runner builds its speculators in this function's closed if/elif",
        until="vLLM has a registry of speculators (vllm-project/vllm#36219)",
    ),
    Patch(
        module="vllm.utils.cpu_triton_utils",
        name="_expand_kernel_impl",
        replacement="vllm_eagle3.runner.hooks.cpu_expand:expand",
        seam=Seam(
            "vllm.utils.cpu_triton_utils",
            "_expand_kernel_impl",
            "output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS",
        ),
        why="on CPU it writes temperatures into a temporary, so sampled speculation reads uninitialised memory "
        "(vllm-project/vllm#55005)",
        until="vllm-project/vllm#55005 is fixed",
    ),
    Patch(
        module="vllm.v1.worker.gpu_model_runner",
        name="RejectionSampler",
        replacement="vllm_eagle3.runner.v1.greedy_rejection_sampler:GreedyRejectionSampler",
        seam=Seam(
            "vllm.v1.sample.rejection_sampler",
            "RejectionSampler.forward",
            "self, metadata, draft_probs, logits, sampling_metadata",
        ),
        why="a greedy verification copies the logits of all its rows three times, which on a CPU costs more than "
        "the argmax they are for",
        until="upstream takes the argmax of greedy rows directly",
    ),
    Patch(
        module="vllm.config.vllm",
        name="VllmConfig.__post_init__",
        replacement="vllm_eagle3.runner.hooks.vllm_config:post_init",
        seam=Seam("vllm.config.vllm", "VllmConfig.__post_init__", "self"),
        why="options are checked at start-up, and the cost policy names its scheduler and chain lengths before vLLM "
        "derives its CUDA graph sizes from them",
        until="vLLM lets plugins see a config before it is settled",
    ),
    Patch(
        module="vllm.engine.arg_utils",
        name="EngineArgs.create_speculative_config",
        replacement="vllm_eagle3.runner.hooks.engine_args:create_speculative_config",
        seam=Seam(
            "vllm.engine.arg_utils",
            "EngineArgs.create_speculative_config",
            "self, target_model_config, target_parallel_config",
        ),
        why="a tree's nodes say how many drafts the scheduler makes room for, and vLLM asks for that number before "
        "any config exists",
        until="vLLM lets plugins see a config before it is settled",
    ),
    *(
        Patch(
            module=module,
            name="InputProcessor",
            replacement="vllm_eagle3.runner.hooks.input_processor:Eagle3InputProcessor",
            seam=Seam(
                "vllm.v1.engine.input_processor",
                "InputProcessor.__init__",
                "self, vllm_config, renderer, mm_registry",
            ),
            why="it refuses min_p and logit_bias while speculating, which the V2 runner applies rightly",
            until="upstream refuses them on the V1 runner only",
        )
        for module in ("vllm.v1.engine.llm_engine", "vllm.v1.engine.async_llm")
    ),
)


_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator"
_MODEL_STATE = "vllm.v1.worker.gpu.model_states.default"
_MODEL_STATE_INTERFACE = "vllm.v1.worker.gpu.model_states.interface"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_AUTOREGRESSIVE = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
# Methods that this project's subclasses override or call with positional arguments.
OVERRIDDEN = (
    Seam(
        _PROPOSER,
        "SpecDecodeBaseProposer.propose",
        "self, num_speculative_tokens, target_token_ids, target_positions, target_hidden_states, next_token_ids, "
        "token_indices_to_sample, common_attn_metadata, sampling_metadata, mm_embed_inputs, "
        "num_rejected_tokens_gpu, slot_mappings",
    ),
    Seam(_PROPOSER, "SpecDecodeBaseProposer._greedy_sample", "self, hidden_states"),
    Seam(_PROPOSER, "SpecDecodeBaseProposer._sample_draft_tokens", "self, hidden_states, sampling_metadata"),
    Seam(
        _PROPOSER,
        "SpecDecodeBaseProposer.dummy_run",
        "self, num_tokens, use_cudagraphs, is_graph_capturing, slot_mappings",
    ),
    Seam(_PROPOSER, "SpecDecodeBaseProposer.load_model", "self, target_model"),
    Seam(
        _PROPOSER,
        "SpecDecodeBaseProposer._update_positions_dependent_metadata",
        "self, positions, common_attn_metadata, batch_size, input_batch_size, block_size",
    ),
    Seam(
        _PROPOSER,
        "SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata",
        "self, common_attn_metadata, draft_index",
    ),
    Seam(_PROPOSER, "compute_probs_and_sample_next_token", "logits, sampling_metadata, use_fp64_gumbel"),
    Seam(
        _AUTOREGRESSIVE,
        "TargetDependentARSpeculator.propose",
        "self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, "
        "num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, dp_sync_state, dummy_run, "
        "skip_attn_for_dummy_run, mm_inputs, is_profile, num_speculative_tokens",
    ),
    Seam(
        _SPECULATOR,
        "DraftModelSpeculator.sample_draft",
        "self, hidden_states, sample_src_positions, idx_mapping, temperature, seeds, draft_step, draft_logits, "
        "spec_step_idx",
        also=(
            "self, hidden_states, sample_src_positions, idx_mapping, temperature, seeds, draft_step, draft_logits, "
            "spec_step_idx, num_steps",  # 0.33
        ),
    ),
    Seam(_SPECULATOR, "DraftModelSpeculator.get_draft_top_tokens", "self, hidden_states, spec_step_idx"),
    # Trees.
    Seam(_SPECULATOR, "DraftModelSpeculator.load_model", "self, target_model"),
    Seam(_AUTOREGRESSIVE, "TargetDependentARSpeculator.init_cudagraph_manager", "self, cudagraph_mode"),
    Seam(_AUTOREGRESSIVE, "TargetDependentARSpeculator.capture", "self"),
    Seam(
        _GRAPHS,
        "CudaGraphManager.__init__",
        "self, vllm_config, device, cudagraph_mode, decode_query_len, lora_capture_cases, varlen_decode, ubatch_runner",
    ),
    Seam(_GRAPHS, "CudaGraphManager.capture", "self, create_forward_fn, progress_bar_desc"),
    Seam(
        _GRAPHS,
        "CudaGraphManager.dispatch",
        "self, num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len, num_ubatches",
    ),
    Seam(_GRAPHS, "CudaGraphManager.run_fullgraph", "self, desc"),
    Seam("vllm.v1.worker.gpu.block_table", "BlockTables.get_dummy_block_tables", "self, num_reqs"),
    Seam(_MODEL_STATE, "DefaultModelState.__init__", "self, vllm_config, model, encoder_cache, device"),
    Seam(_MODEL_STATE, "DefaultModelState.add_request", "self, req_index, new_req_data"),
    Seam(
        _MODEL_STATE,
        "DefaultModelState.prepare_attn",
        "self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, "
        "for_capture, ubatch_idx, model_specific_attn_metadata",
    ),
    Seam(_MODEL_STATE, "DefaultModelState.prepare_inputs", "self, input_batch, req_states"),
    Seam(_MODEL_STATE, "DefaultModelState.prepare_dummy_inputs", "self, num_reqs, num_tokens"),
    Seam(_MODEL_STATE_INTERFACE, "ModelState.initialize_kv_cache", "self, kv_cache_config, block_tables"),
    Seam(_MODEL_STATE_INTERFACE, "ModelState.custom_sampler", "self, sampler"),
    Seam(
        _MODEL_STATE_INTERFACE,
        "ModelState.postprocess_state",
        "self, idx_mapping, num_sampled, num_computed_tokens",
    ),
    Seam(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler",
        "RejectionSampler._verify",
        "self, logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, idx_mapping_np, "
        "expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np, verify_draft_sampled",
    ),
    Seam(
        "vllm.v1.attention.backends.triton_attn",
        "TritonAttentionImpl.forward",
        "self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale",
    ),
)

_installed = False


def install() -> None:
    """Arrange every replacement of the ledger in this process. Idempotent."""
    global _installed
    if not _installed:
        _installed = True
        after_import({patch.module: _apply_all for patch in LEDGER})


def _apply_all(module: ModuleType) -> None:
    for patch in LEDGER:
        if patch.module == module.__name__:
            patch.apply(module)
