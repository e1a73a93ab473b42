"""Installs the cost policy in an engine: sets its scheduler class and the numbers of drafts that it may choose."""

from __future__ import annotations

import logging
import math
from itertools import chain
from typing import TYPE_CHECKING

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.policy.cost_file import CostKey
from vllm_eagle3.policy.shape import Shape, menu

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.eagle3")

SCHEDULER = "vllm_eagle3.runner.policy_scheduler.build_scheduler"
FIXED_SCHEDULER = "vllm_eagle3.runner.policy_scheduler.build_fixed_scheduler"
MOST_REQUESTS = 512  # requests in the widest CUDA graph, as in vLLM's default
MOST_TOKENS = (
    1024  # in a CUDA graph that drafts: FlashAttention 3 keeps 32 fp32 partial outputs a token (4 bytes each)
)


def install(vllm_config: VllmConfig, options: Eagle3Options) -> bool:
    """Make `vllm_config` use the policy if the options say so. Idempotent. Returns whether it does.

    Call it for method eagle3 before vLLM derives its CUDA graph sizes from the config (at the start of
    `VllmConfig.__post_init__`), in the process that builds the config. If something else already decides the number of
    drafts, the policy is not installed, and a warning says so.
    """
    if in_charge(vllm_config):
        return True
    if options.policy != "auto":
        _install_fixed(vllm_config)
        return False
    reason = _obstacle(vllm_config)
    if reason is not None:
        logger.warning("vllm-eagle3: policy 'auto' is off, the number of drafts is fixed: %s", reason)
        _install_fixed(vllm_config)
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
        if given is None:
            graphs.cudagraph_capture_sizes = _graph_sizes([k + 1 for k in sizes], scheduler.max_num_seqs)
    # One range per size: the runner captures graphs for exactly these sizes, and the policy chooses among them.
    # The last range reaches to the widest batch, because vLLM derives the sizes to capture from it.
    spec.num_speculative_tokens_per_batch_size = [
        (i, i if size != sizes[-1] else max(i, scheduler.max_num_seqs), size)
        for i, size in enumerate(sizes, 1)
    ]
    return True


def _install_fixed(vllm_config: VllmConfig) -> None:
    """Install the scheduler for policy "fixed", so that requests can limit their drafts and metrics are complete."""
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = FIXED_SCHEDULER
    elif scheduler.scheduler_cls != FIXED_SCHEDULER:
        logger.warning(
            "vllm-eagle3: scheduler_cls is %r: requests cannot limit their drafts, and the counters vllm:eagle3_* "
            "stay 0",
            scheduler.scheduler_cls,
        )


def _obstacle(vllm_config: VllmConfig) -> str | None:
    """Why the policy cannot decide the number of drafts of this engine; None if it can."""
    spec, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    assert spec is not None
    if spec.num_speculative_tokens_per_batch_size is not None:
        return "num_speculative_tokens_per_batch_size is given"
    if vllm_config.scheduler_config.scheduler_cls not in (None, FIXED_SCHEDULER):
        return f"scheduler_cls is {vllm_config.scheduler_config.scheduler_cls!r}"
    if getattr(spec, "enable_adaptive_verification", False):
        return "enable_adaptive_verification is on"
    if parallel.data_parallel_size > 1:
        return "all data-parallel ranks must make the same number of drafts"
    if vllm_config.device_config.device_type == "cuda" and not vllm_config.use_v2_model_runner:
        return "the V1 runner has no full CUDA graphs for changing numbers of drafts"
    return None


def _sizes(most: int, options: Eagle3Options, every: bool) -> list[int]:
    """Numbers of drafts per request that the policy may choose, from 0 to `most`.

    every: all lengths of chains, and the menu of trees. Otherwise query lengths (drafts + 1) that CUDA graphs can
    share: for chains those that divide the longest one (or twice that, if it is odd); for trees a quarter, a half and
    all of the largest multiple of four, which costs a tree at most three nodes.
    """
    if options.tree is None:
        length = most + 1 if most % 2 else 2 * (most + 1)
        return [k for k in range(most + 1) if every or length % (k + 1) == 0]
    most = largest_tree(most, options).nodes
    if every:
        return [shape.nodes for shape in menu(largest_tree(most, options))]
    if most < 3:
        return list(range(most + 1))
    quarter = (most + 1) // 4
    return sorted({0, *(quarter * part - 1 for part in (1, 2, 4))})


def _graph_sizes(lengths: list[int], max_num_seqs: int) -> list[int]:
    """Numbers of tokens for which CUDA graphs are captured, so that a batch of any of these query lengths finds one.

    lengths: the query lengths that a batch may have, ascending. vLLM captures at each number, rounded up to a multiple
    of every query length. For a batch it looks only at the next captured number, which must be a multiple of the
    batch's query length, as a common multiple of all lengths always is. Where common multiples are too far apart, every
    multiple of every length is captured: for few tokens, and near the greatest number of requests.
    """
    common = math.lcm(*lengths)
    requests = min(max_num_seqs, MOST_REQUESTS)
    widest = requests * lengths[-1]
    most = max(MOST_TOKENS, requests, lengths[-1])
    if widest > most:
        widest = max(most // common * common, requests)
    counts = chain(
        range(1, 8), range(8, 32, 4), range(32, 128, 8), range(128, 256, 16), range(256, widest + 1, 32)
    )
    sizes = {common * count for count in counts}
    if common > 16:  # rounding up to it would cost more than a few rows
        sizes = {size for size in sizes if size > 4 * common} | set(_multiples(lengths, 0, 4 * common))
    for length in lengths:  # batches of max_num_seqs requests, and nearly that many
        full = min(requests * length, widest)
        below = full // common * common
        sizes |= {full, below, *_multiples(lengths, below, below + common)}
    while True:
        rounded = {-(-size // length) * length for size in sizes for length in lengths}
        if rounded <= sizes:
            return sorted(size for size in sizes if 0 < size <= widest)
        sizes |= rounded


def _multiples(lengths: list[int], above: int, most: int) -> list[int]:
    """All multiples in (above, most] of the lengths except 1; for length 1 the powers of two below the next length."""
    longer = [length for length in lengths if length > 1] or [most + 1]
    found = [n for n in range(above + 1, most + 1) if any(n % length == 0 for length in longer)]
    powers = [1 << i for i in range(min(longer).bit_length()) if above < 1 << i < min(longer)]
    return sorted({*found, *(powers if 1 in lengths else [])})


def largest_tree(most: int, options: Eagle3Options) -> Shape:
    """The tree of the options with room for its graft, cut to `most` nodes."""
    assert options.tree is not None
    graft = options.grafts.length if options.grafts else 0
    nodes = min(most, options.tree.nodes + graft)
    return Shape(nodes, min(options.tree.depth, nodes), options.tree.topk, graft)


def tree_shapes(vllm_config: VllmConfig, options: Eagle3Options) -> dict[int, Shape]:
    """Shapes by their number of nodes, if they are not just the best nodes of the options' tree.

    The scheduler tells the workers only that number, so both look it up here. On a GPU there are none: one CUDA graph
    grows the tree of the options, and a smaller number takes its best nodes.
    """
    if vllm_config.device_config.device_type != "cpu":
        return {}
    assert vllm_config.speculative_config is not None
    largest = largest_tree(vllm_config.speculative_config.num_speculative_tokens, options)
    return {shape.nodes: shape for shape in menu(largest)}


def in_charge(vllm_config: VllmConfig) -> bool:
    """Whether the policy decides how much this engine drafts."""
    return vllm_config.scheduler_config.scheduler_cls == SCHEDULER


def cost_key(vllm_config: VllmConfig) -> CostKey:
    """What the step times of this engine depend on. The same in the engine's process and in its workers'."""
    import torch
    from vllm import __version__ as vllm_version
    from vllm.platforms import current_platform

    model, spec = vllm_config.model_config, vllm_config.speculative_config
    assert spec is not None and spec.draft_model_config is not None
    device = vllm_config.device_config.device_type
    name = (
        current_platform.get_device_name()
        if device == "cuda"
        else f"{device} {torch.get_num_threads()} threads"
    )
    parallel = vllm_config.parallel_config
    parts = (
        f"vllm {vllm_version}",
        f"{model.dtype}",
        f"tp{parallel.tensor_parallel_size}",
        f"pp{parallel.pipeline_parallel_size}",
        f"eager {model.enforce_eager}",
        f"runner V{2 if vllm_config.use_v2_model_runner else 1}",
        f"options {vllm_config.additional_config}",
    )
    return CostKey(str(model.model), str(spec.draft_model_config.model), name, ", ".join(parts))
