"""Mends a defect of vLLM on a CPU: a request with a seed ends the engine if its prompt takes several steps."""

from typing import Any

import numpy as np
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_stock: Any = GPUModelRunner.sample_tokens


def sample_tokens(self: Any, grammar_output: Any) -> Any:
    """Replaces `GPUModelRunner.sample_tokens`.

    A step that ends within a prompt throws its sampled token away. Upstream then resets the request's random generator
    by an offset, which CPU generators do not have. On a CPU this keeps the generators of such requests out of the
    step.
    """
    if self.device.type != "cpu":
        return _stock(self, grammar_output)
    generators = self.input_batch.generators
    discarded = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
    kept = {row: generators.pop(row) for row in discarded if row in generators}
    try:
        return _stock(self, grammar_output)
    finally:
        generators.update(kept)
