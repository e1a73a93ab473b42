"""At the start on a GPU, times a few dummy steps: the policy's model of step times, until it has seen real ones."""

import logging
from typing import Any

from vllm.distributed.parallel_state import get_world_group
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.policy.cost_file import CostFile
from vllm_eagle3.policy.cost_table import TimedStep, cost_table
from vllm_eagle3.runner.policy_install import cost_key, in_charge, largest_tree

logger = logging.getLogger("vllm.eagle3")

TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024)
REPEATS = 4  # of each size; the first is left out, because it may compile kernels

_stock: Any = GPUModelRunner.capture_model


def capture_model(self: Any, *, profile_only: bool = False) -> int:
    """Replaces `GPUModelRunner.capture_model`: what runs fast only once its graphs are captured is timed after it."""
    size = _stock(self, profile_only=profile_only)
    parallel = self.vllm_config.parallel_config
    if not profile_only and in_charge(self.vllm_config) and parallel.pipeline_parallel_size == 1:
        keep_step_costs(self)
    return size


def keep_step_costs(runner: Any) -> None:
    """Time dummy steps on all ranks, and have the first write the cost file that the scheduler reads.

    The scheduler is built after the workers have started, in another process where there are several workers. With
    pipeline stages no worker sees a whole step, so there the policy starts from its guess.
    """
    config = runner.vllm_config
    sizes = [size for size in TOKENS if size <= runner.max_num_tokens]
    with runner.step_timing.collect() as samples:
        for size in sizes:
            for _ in range(REPEATS):
                runner._dummy_run(size)
    if not get_world_group().is_first_rank:
        return
    steps = [
        TimedStep(s.num_target_tokens, s.num_reqs, s.forward_ms / 1e3, s.drafter_ms / 1e3)
        for index, s in enumerate(samples)
        if index % REPEATS
    ]
    options = Eagle3Options.from_additional_config(config.additional_config)
    most = config.speculative_config.num_speculative_tokens
    shape = largest_tree(most, options) if options.tree is not None else None
    model = cost_table(steps, shape.depth if shape else most, shape.width if shape else 1)
    logger.info(
        "vllm-eagle3: timed %d dummy steps: %s ms for the target",
        len(samples),
        ", ".join(f"{1e3 * seconds:.2f} ({tokens} tokens)" for tokens, seconds in model.target[0].items()),
    )
    CostFile(cost_key(config)).keep_model(model)
