"""An upstream defect of vLLM on a CPU: a request with a seed ends the engine when its prompt takes several steps."""

from typing import Any

import numpy as np
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_stock: Any = GPUModelRunner.sample_tokens


def sample_tokens(self: Any, grammar_output: Any) -> Any:
    """Replaces `GPUModelRunner.sample_tokens`.

    In a step that ends within a prompt, what is sampled is thrown away, and upstream turns the request's random numbers
    back by an offset that CPU generators do not have. On a CPU, such a request's generator is kept away from the step.
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
