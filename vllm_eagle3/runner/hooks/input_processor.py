"""Accept min_p and logit_bias with EAGLE-3 on Model Runner V2, and check a request's limit of drafts."""

from typing import Any

from vllm.v1.engine.input_processor import InputProcessor

from vllm_eagle3.runner.request_limit import check_limit


class Eagle3InputProcessor(InputProcessor):
    """Validates requests while EAGLE-3 speculates.

    Upstream refuses `min_p` and `logit_bias` with status 400 while speculating, because the V1 runner ignores both. V2
    applies them to the target's logits, row by row, before it verifies, so there they are accepted.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        spec = self.speculative_config
        self._most_drafts: int | None = None
        if spec is None or spec.method != "eagle3":
            return
        self._most_drafts = spec.num_speculative_tokens
        if (
            vllm_config.use_v2_model_runner
            and not self.model_config.enable_trace_replay  # also refused through this attribute
        ):
            self.speculative_config = None  # only the validation of requests reads it

    def _validate_params(self, params: Any, *args: Any, **kwargs: Any) -> bool | None:
        if self._most_drafts is not None:
            check_limit(params, self._most_drafts)
        return super()._validate_params(params, *args, **kwargs)
