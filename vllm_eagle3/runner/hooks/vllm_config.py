"""Validate the plugin's options and install the policy scheduler when a `VllmConfig` is built."""

from vllm.config.vllm import VllmConfig

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.runner import policy_install

_stock_post_init = VllmConfig.__post_init__


def post_init(self: VllmConfig) -> None:
    """Replaces `VllmConfig.__post_init__`, because the policy has to act before vLLM derives its CUDA graph sizes.

    Raises:
        ValueError: a bad option in `additional_config`.
    """
    speculative = self.speculative_config
    if speculative is not None and speculative.method == "eagle3":
        policy_install.install(self, Eagle3Options.from_additional_config(self.additional_config))
    _stock_post_init(self)
