"""The part of the ledger's overrides that serves operators: a request's limit of drafts, and statistics."""

from vllm_eagle3.runner.upstream import Subclass, UpstreamSignature


def methods(module: str, owner: str, **signatures: str) -> tuple[UpstreamSignature, ...]:
    """Signatures of methods of the class `owner` in `module`, by name."""
    return tuple(UpstreamSignature(module, f"{owner}.{name}", text) for name, text in signatures.items())


SERVING_SUBCLASSES = (
    Subclass(
        "vllm_eagle3.runner.draft_scheduler:DraftScheduler",
        methods(
            "vllm.v1.core.sched.scheduler",
            "Scheduler",
            __init__="self, vllm_config, kv_cache_config, structured_output_manager, block_size, hash_block_size, "
            "mm_registry, include_finished_set, log_stats",
            add_request="self, request",
            update_draft_token_ids="self, draft_token_ids",
            update_from_output="self, scheduler_output, model_runner_output",
            make_stats="self, spec_decoding_stats, kv_connector_stats, cudagraph_stats, perf_stats, ec_connector_stats",
            make_spec_decoding_stats="self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, "
            "num_invalid_spec_tokens, request_id",
        ),
        reason="a request may limit its drafts, and operators see what is drafted and accepted",
        remove_when="vLLM has a limit of drafts a request, and metrics that a scheduler adds",
    ),
    Subclass(
        "vllm_eagle3.runner.hooks.spec_metrics:Eagle3Stats",
        methods(
            "vllm.v1.spec_decode.metrics",
            "SpecDecodingStats",
            observe_draft="self, num_draft_tokens, num_accepted_tokens",
        ),
        reason="carries what our scheduler counts to the front end",
        remove_when="a scheduler can send metrics of its own to the front end",
    ),
    Subclass(
        "vllm_eagle3.runner.hooks.spec_metrics:Eagle3Prom",
        methods(
            "vllm.v1.spec_decode.metrics",
            "SpecDecodingProm",
            __init__="self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion",
            observe="self, spec_decoding_stats, engine_idx",
        ),
        reason="shows what our scheduler counts as Prometheus series",
        remove_when="a scheduler can send metrics of its own to the front end",
    ),
    Subclass(
        "vllm_eagle3.runner.hooks.spec_metrics:Eagle3Logging",
        methods(
            "vllm.v1.spec_decode.metrics",
            "SpecDecodingLogging",
            reset="self",
            observe="self, spec_decoding_stats",
            log="self, log_fn",
        ),
        reason="shows what our scheduler counts in the log",
        remove_when="a scheduler can send metrics of its own to the front end",
    ),
)
