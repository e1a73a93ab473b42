"""Runs several vLLM engines one after the other in one process, and cleans up after each."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SMALL = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
}


@contextmanager
def running(model: Any, **kwargs: Any) -> Iterator[Any]:
    """A context with `vllm.LLM(model, **kwargs)` and small defaults. It is shut down and freed at the end.

    It always makes all drafts (policy "fixed"), and uses no grafts unless they are requested, so that its drafts
    depend only on the draft model.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_eagle3.runner.engine_memory import memory_arguments

    options = {"policy": "fixed", "graft": False, "draft_sampling": "greedy"} | kwargs.pop(
        "additional_config", {}
    ).get("eagle3", {})
    arguments = SMALL | kwargs
    speculation = arguments.get("speculative_config") or {}
    memory = memory_arguments(
        model,
        speculation.get("model"),
        batch_size=arguments["max_num_seqs"],
        max_model_len=arguments["max_model_len"],
        drafts=speculation.get("num_speculative_tokens", 0),
        dtype=arguments["dtype"],
    )
    llm = LLM(model=str(model), additional_config={"eagle3": options}, **(memory | arguments))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        _forget_tree_attention()


def _forget_tree_attention() -> None:
    """Undo `select_tree_attention`, which on a CPU changes the whole process."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum.CPU_ATTN.clear_override()
    selector._cached_get_attn_backend.cache_clear()


def speculative(draft: Any, tokens: int, **kwargs: Any) -> dict[str, Any]:
    """`speculative_config` of method eagle3."""
    return {"method": "eagle3", "model": str(draft), "num_speculative_tokens": tokens, **kwargs}


def token_ids(llm: Any, prompts: list[list[int]], params: Any) -> list[list[int]]:
    """Generated ids per prompt; `params` is one SamplingParams or a list of them."""
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def draft_model(llm: Any) -> Any:
    """The draft of an engine in this process, on either runner."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return (runner.drafter if hasattr(runner, "drafter") else runner.speculator).model


def asynchronous(monkeypatch: Any) -> None:
    """Let the engines of a test schedule asynchronously, although vLLM switches that off on a CPU."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(check_and_update_config))
