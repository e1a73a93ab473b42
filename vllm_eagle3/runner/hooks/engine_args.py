"""Take `num_speculative_tokens` from the size of the draft tree when the user gives none."""

from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_eagle3.config import Eagle3Options

_stock = EngineArgs.create_speculative_config


def create_speculative_config(self: EngineArgs, target_model_config: Any, target_parallel_config: Any) -> Any:
    """Replaces the method of this name. Without `num_speculative_tokens`, the number of the tree's nodes is taken.

    Raises:
        ValueError: a bad option in `additional_config`.
    """
    given = {key.replace("-", "_"): value for key, value in (self.speculative_config or {}).items()}
    method = given.get("method", self.spec_method)
    tokens = given.get("num_speculative_tokens", self.spec_tokens)
    if method == "eagle3" and tokens is None:
        tree = Eagle3Options.from_additional_config(self.additional_config).tree
        if tree is not None:
            self.speculative_config = given | {"num_speculative_tokens": tree.nodes}
    return _stock(self, target_model_config, target_parallel_config)
