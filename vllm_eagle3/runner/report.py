"""The one line at start-up that says what drafts, and with what."""

import logging
from typing import Any

from vllm_eagle3.checkpoint import DraftConfig

logger = logging.getLogger("vllm.eagle3")


def report(config: DraftConfig, runner: str, vllm_config: Any, form: str) -> None:
    """Log proposer, runner, layers, vocabulary and kernels (`form`) at info level."""
    speculative = vllm_config.speculative_config
    logger.info(
        "vllm-eagle3: drafting for %s on the %s runner (%s): %s, aux layers %s, draft vocabulary %d of %d, "
        "up to %d draft tokens",
        vllm_config.model_config.model,
        runner,
        form,
        config.dialect,
        list(config.aux_layers or ()),
        config.draft_vocab_size,
        config.vocab_size,
        speculative.num_speculative_tokens,
    )


def report_lookahead(vllm_config: Any, nodes: int) -> None:
    """Log what a tree's room costs: slots in the KV cache, and tokens of the scheduler's budget."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = vllm_config.cache_config.cache_dtype
    width = model.dtype.itemsize if dtype == "auto" else 4 if dtype == "float32" else 2
    token = (
        2 * model.get_num_kv_heads(parallel) * model.get_head_size() * model.get_num_layers(parallel) * width
    )
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    logger.info(
        "vllm-eagle3: a tree of %d nodes keeps %d slots free behind every running request (%.1f MB of the target's KV "
        "cache each, a rank) and takes %d of the %d tokens of a step: at most %d requests decode at a time",
        nodes,
        nodes + 1,
        (nodes + 1) * token / 1e6,
        nodes + 1,
        budget,
        budget // (nodes + 1),
    )
