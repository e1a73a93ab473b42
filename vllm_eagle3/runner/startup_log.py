"""Writes the log lines at start-up: which proposer drafts, and how much memory draft trees reserve."""

import logging
from typing import Any

from vllm_eagle3.checkpoint import DraftConfig
from vllm_eagle3.config import TreeOptions

logger = logging.getLogger("vllm.eagle3")


def report(config: DraftConfig, runner: str, vllm_config: Any, form: str, own_draws: bool = False) -> None:
    """Log proposer, runner, layers, vocabulary and kernels (`form`) at info level.

    own_draws: drafts are drawn by this project, which logs what that takes.
    """
    speculative = vllm_config.speculative_config
    logger.info(
        "vllm-eagle3: drafting for %s on the %s runner (%s): %s, aux layers %s, draft vocabulary %d of %d, "
        "%s%d draft tokens a step",
        vllm_config.model_config.model,
        runner,
        form,
        config.dialect,
        list(config.aux_layers or ()),
        config.draft_vocab_size,
        config.vocab_size,
        "up to " if speculative.uses_dynamic_speculative_decoding() else "",
        speculative.num_speculative_tokens,
    )
    if speculative.draft_sample_method == "probabilistic" and runner == "V2" and not own_draws:
        requests, drafts = vllm_config.scheduler_config.max_num_seqs, speculative.num_speculative_tokens
        size = requests * drafts * config.vocab_size * vllm_config.model_config.head_dtype.itemsize
        logger.info(
            "vllm-eagle3: drafts are drawn where requests sample; the draft's distributions take %.0f MB (%d requests "
            "of %d drafts). The option draft_sampling 'greedy' does without", size / 1e6, requests, drafts,
        )  # fmt: skip


def report_lookahead(vllm_config: Any, tree: TreeOptions) -> None:
    """Log a tree's shape, and what it reserves: slots of the KV cache and tokens of the scheduler's budget."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = vllm_config.cache_config.cache_dtype
    width = model.dtype.itemsize if dtype == "auto" else 4 if dtype == "float32" else 2
    heads, layers = model.get_num_kv_heads(parallel), model.get_num_layers(parallel)
    token = 2 * heads * model.get_head_size() * layers * width
    room = vllm_config.speculative_config.num_speculative_tokens + 1
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    logger.info(
        "vllm-eagle3: draft trees of depth %d, topk %d, %d nodes; %d slots are kept free behind every running request "
        "(%.1f MB of the target's KV cache for each request on each rank), and each request takes %d of the %d tokens "
        "of a step: at most %d requests decode at a time. Beside the cache, the grammar bitmask takes %.1f MB (it "
        "grows with max_num_seqs) and the scratch keys of the draft %.1f MB",
        tree.depth,
        tree.topk,
        tree.nodes,
        room,
        room * token / 1e6,
        room,
        budget,
        budget // room,
        grammar_bitmask_bytes(vllm_config) / 1e6,
        scratch_bytes(vllm_config, tree) / 1e6,
    )


def grammar_bitmask_bytes(vllm_config: Any) -> int:
    """Bytes of the bitmask of structured outputs on the device: one bit per token, one row per node of a request."""
    rows = vllm_config.scheduler_config.max_num_seqs * (
        vllm_config.speculative_config.num_speculative_tokens + 1
    )
    return rows * -(-vllm_config.model_config.get_vocab_size() // 32) * 4


def scratch_bytes(vllm_config: Any, tree: TreeOptions) -> int:
    """Bytes of the keys and values of growing trees: all levels but the last, for every request."""
    draft, parallel = vllm_config.speculative_config.draft_model_config, vllm_config.parallel_config
    nodes = vllm_config.scheduler_config.max_num_seqs * (tree.depth - 1) * tree.topk
    return 2 * nodes * draft.get_num_kv_heads(parallel) * draft.get_head_size() * draft.dtype.itemsize
