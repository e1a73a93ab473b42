"""Validates the plugin's options and installs the policy scheduler when a `VllmConfig` is built."""

from vllm import envs
from vllm.config.vllm import VllmConfig
from vllm.triton_utils import HAS_TRITON

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.runner import policy_install

_stock_post_init = VllmConfig.__post_init__


def post_init(self: VllmConfig) -> None:
    """Replaces `VllmConfig.__post_init__`, because the policy has to act before vLLM derives its CUDA graph sizes.

    Raises:
        ValueError: a bad option in `additional_config`; a tree without the V2 runner; settings with which vLLM's
            runner does not speculate.
    """
    speculative = self.speculative_config
    if speculative is not None and speculative.method == "eagle3":
        options = Eagle3Options.from_additional_config(self.additional_config)
        if options.tree is not None and not self.use_v2_model_runner:
            raise ValueError(
                "additional_config: option 'eagle3.tree': draft trees need vLLM's V2 model runner, this engine gets "
                f"the V1 runner {_why_v1()}. Without the option it drafts chains"
            )
        if not self.use_v2_model_runner:
            _refuse_on_v1(self)
        elif self.device_config.device_type == "cpu":
            _refuse_on_v2(self)
        policy_install.install(self, options)
    _stock_post_init(self)


def _refuse_on_v1(config: VllmConfig) -> None:
    """Raise ValueError for settings that vLLM's V1 runner ignores without a word, or that end the engine later.

    It uses "standard" in place of the rejection method "block". With "synthetic", an engine on a CPU ends at the first
    drafts. With several pipeline stages, those without the last layer look for a proposer, which they do not have.
    """
    assert config.speculative_config is not None
    method, device = config.speculative_config.rejection_sample_method, config.device_config.device_type
    if method == "block":
        raise ValueError("vLLM's V1 runner has no rejection_sample_method 'block': leave it out")
    if method == "synthetic" and device == "cpu":
        raise ValueError(
            "vLLM's V1 runner has no synthetic acceptance on a CPU: leave rejection_sample_method out"
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "vLLM's V1 runner does not speculate over several pipeline stages: use tensor parallelism"
        )


def _refuse_on_v2(config: VllmConfig) -> None:
    """Raise ValueError for settings with which vLLM's V2 runner on a CPU waits for ever, or ends in the first step."""
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "vLLM's V2 runner stops answering on a CPU where it speculates over several pipeline stages: "
            "use tensor parallelism"
        )
    if config.lora_config is not None:
        raise ValueError(
            "vLLM's V2 runner does not speculate with LoRA on a CPU: leave VLLM_USE_V2_MODEL_RUNNER unset"
        )


def _why_v1() -> str:
    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        return "because VLLM_USE_V2_MODEL_RUNNER is 0"
    if not HAS_TRITON:
        return "because Triton has no backend for this device"
    return "because vLLM does not run this configuration on V2 (its log says why)"
