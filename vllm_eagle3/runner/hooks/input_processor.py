"""Accept min_p and logit_bias with EAGLE-3 on Model Runner V2."""

from typing import Any

from vllm.v1.engine.input_processor import InputProcessor


class Eagle3InputProcessor(InputProcessor):
    """Accepts requests with `min_p` and `logit_bias` while EAGLE-3 speculates on Model Runner V2.

    Upstream refuses them with status 400, because the V1 runner ignores both while speculating. V2 applies them to
    the target's logits, row by row, before it verifies.
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
            self.speculative_config = None  # only the validation of requests reads it
