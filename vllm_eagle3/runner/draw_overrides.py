"""The part of the ledger's overrides that draws and verifies chains on a CPU, and what it shares with trees."""

from vllm_eagle3.runner.serving_overrides import methods
from vllm_eagle3.runner.upstream import Subclass, UpstreamSignature

SET_ATTN = UpstreamSignature(
    "vllm.v1.worker.gpu.spec_decode.speculator",
    "DraftModelSpeculator.set_attn",
    "self, model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups",
)
REJECTION_SAMPLER = methods(
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler",
    "RejectionSampler",
    __init__="self, sampler, spec_config, device, watermark_key",
    _verify="self, logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, idx_mapping_np, "
    "expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np, verify_draft_sampled",
)
_MODEL_STATES = "vllm.v1.worker.gpu.model_states"
_NO_SMALL_DRAWS = "vLLM keeps distributions of drafts over the draft's vocabulary"

DRAW_SUBCLASSES = (
    Subclass(
        "vllm_eagle3.runner.v2.chain_draws:ChainModelState",
        (
            *methods(
                f"{_MODEL_STATES}.default", "DefaultModelState", add_request="self, req_index, new_req_data"
            ),
            *methods(f"{_MODEL_STATES}.interface", "ModelState", custom_sampler="self, sampler"),
        ),
        reason="drawn chains are verified by a rule of this project",
        remove_when=_NO_SMALL_DRAWS,
    ),
    Subclass(
        "vllm_eagle3.runner.v2.chain_draws:ChainRejectionSampler",
        REJECTION_SAMPLER,
        reason="upstream keeps the draft's distributions over the target's vocabulary",
        remove_when=_NO_SMALL_DRAWS,
    ),
)
