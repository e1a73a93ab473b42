"""What changes in vLLM's front end, where requests are validated."""

from typing import Any

from vllm.v1.engine.input_processor import InputProcessor


class Eagle3InputProcessor(InputProcessor):
    """Lets requests with `min_p` and `logit_bias` through while EAGLE-3 speculates on Model Runner V2.

    Upstream answers them with 400 for the V1 runner's sake, which ignores both while speculating. V2 applies
    them to the target's logits before it verifies, row by row, so its output follows them.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        spec = self.speculative_config
        if (
            spec is not None
            and spec.method == "eagle3"
            and vllm_config.use_v2_model_runner
            and not self.model_config.enable_trace_replay  # also refused through this attribute
        ):
            self.speculative_config = None  # read by the validation of requests, nothing else
