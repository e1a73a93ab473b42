"""Put the cost policy in charge of an engine: its scheduler class, and the numbers of drafts that it may choose."""

from __future__ import annotations

import logging
import math
from itertools import chain
from typing import TYPE_CHECKING

from vllm_eagle3.config import Eagle3Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.eagle3")

SCHEDULER = "vllm_eagle3.runner.policy_scheduler.build_scheduler"
MOST_CAPTURED = 512  # requests in the widest CUDA graph, as vLLM's default
TREE_SHARES = (0.25, 0.5, 1.0)  # of the tree's nodes


def install(vllm_config: VllmConfig, options: Eagle3Options) -> bool:
    """Make `vllm_config` use the policy if the options say so. Idempotent. Returns whether it does.

    To be called for method eagle3 before vLLM derives its CUDA graph sizes from the config (at the start of
    `VllmConfig.__post_init__`), in the process that builds the config. Where something else already decides the
    number of drafts, the policy is not installed, with a warning.
    """
    if options.policy != "auto":
        return False
    if in_charge(vllm_config):
        return True
    reason = _obstacle(vllm_config)
    if reason is not None:
        logger.warning("vllm-eagle3: policy 'auto' is off, the number of drafts is fixed: %s", reason)
        return False
    spec, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    assert spec is not None
    scheduler.scheduler_cls = SCHEDULER
    on_cpu = vllm_config.device_config.device_type == "cpu"
    sizes = _sizes(spec.num_speculative_tokens, options, every=on_cpu)
    if not on_cpu:
        # vLLM captures graphs for as many numbers of drafts as there are batch sizes.
        sizes = sizes[-scheduler.max_num_seqs :]
        graphs = vllm_config.compilation_config
        given = graphs.cudagraph_capture_sizes or graphs.max_cudagraph_capture_size
        if options.tree is None and given is None:
            graphs.cudagraph_capture_sizes = _graph_sizes(sizes, scheduler.max_num_seqs)
    # One range a size: the runner captures graphs for exactly these sizes, and the policy chooses among them.
    # The last range reaches to the widest batch, because vLLM derives the sizes to capture from it.
    spec.num_speculative_tokens_per_batch_size = [
        (i, i if size != sizes[-1] else max(i, scheduler.max_num_seqs), size)
        for i, size in enumerate(sizes, 1)
    ]
    return True


def _obstacle(vllm_config: VllmConfig) -> str | None:
    """Why the policy cannot decide the number of drafts of this engine; None if it can."""
    spec, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    assert spec is not None
    if spec.num_speculative_tokens_per_batch_size is not None:
        return "num_speculative_tokens_per_batch_size is given"
    if vllm_config.scheduler_config.scheduler_cls is not None:
        return f"scheduler_cls is {vllm_config.scheduler_config.scheduler_cls!r}"
    if getattr(spec, "enable_adaptive_verification", False):
        return "enable_adaptive_verification is on"
    if parallel.data_parallel_size > 1:
        return "all data-parallel ranks must make the same number of drafts"
    if vllm_config.device_config.device_type == "cuda" and not vllm_config.use_v2_model_runner:
        return "the V1 runner has no full CUDA graphs for changing numbers of drafts"
    return None


def _sizes(most: int, options: Eagle3Options, every: bool) -> list[int]:
    """Numbers of drafts a request that the policy may choose, from 0 to `most`.

    every: all lengths of chains. Otherwise only those whose query length, K + 1, divides the longest query length (or
    twice that, if it is odd).
    """
    if options.tree is not None:
        return sorted({0, *(max(round(share * most), 1) for share in TREE_SHARES)})
    length = most + 1 if most % 2 else 2 * (most + 1)
    return [k for k in range(most + 1) if every or length % (k + 1) == 0]


def _graph_sizes(sizes: list[int], max_num_seqs: int) -> list[int]:
    """Numbers of tokens to capture CUDA graphs for: multiples of every query length.

    vLLM looks for a full graph only at the next captured number of tokens, whichever query length that number was
    captured for. So every number has to be captured for all query lengths.
    """
    lengths = [size + 1 for size in sizes]
    common = math.lcm(*lengths)
    requests = min(max_num_seqs, MOST_CAPTURED)
    widest = [max(requests * length // common, 1) for length in lengths]
    steps = ((1, 8, 1), (8, 32, 4), (32, 128, 8), (128, 256, 16), (256, max(widest), 32))
    counts = {*widest, *chain.from_iterable(range(*step) for step in steps)}
    return [common * count for count in sorted(counts) if count <= max(widest)]


def in_charge(vllm_config: VllmConfig) -> bool:
    """Whether the policy decides how much this engine drafts."""
    return vllm_config.scheduler_config.scheduler_cls == SCHEDULER
