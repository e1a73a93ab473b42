"""Chooses the speculator of the V2 model runner: this project's for chains or trees, or vLLM's own."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode import init_speculator as stock_init_speculator

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.model.activate import activate
from vllm_eagle3.runner.startup_log import report, report_lookahead
from vllm_eagle3.runner.v2.cpu_speculator import CPUSpeculator, draws_chains, serves
from vllm_eagle3.runner.v2.speculator import Eagle3Speculator
from vllm_eagle3.runner.v2.tree_limits import refuse_unsupported


def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
    """Replaces vLLM's function of this name. Drafts that this project does not support get vLLM's speculator."""
    draft_config = activate(vllm_config)
    if draft_config is None:
        return stock_init_speculator(vllm_config, device, req_states)
    options = Eagle3Options.from_additional_config(vllm_config.additional_config)
    if options.tree is not None:
        report(draft_config, "V2", vllm_config, "tree")
        report_lookahead(vllm_config, options.tree)
        return _tree_speculator(vllm_config, device, options, req_states)
    on_cpu = serves(vllm_config, device)
    report(draft_config, "V2", vllm_config, "chain", own_draws=on_cpu and draws_chains(vllm_config))
    return (CPUSpeculator if on_cpu else Eagle3Speculator)(vllm_config, device)


def _tree_speculator(
    vllm_config: VllmConfig, device: torch.device, options: Eagle3Options, req_states: Any
) -> Eagle3Speculator:
    """Called before the model is built, because it selects the attention backend.

    Raises:
        ValueError: this engine has settings that trees do not support. The message names all of them.
    """
    from vllm_eagle3.runner.v2.cpu_tree_speculator import CPUTreeSpeculator
    from vllm_eagle3.runner.v2.select_attention import select_tree_attention
    from vllm_eagle3.runner.v2.tree_speculator import TreeSpeculator

    refuse_unsupported(vllm_config, options)
    select_tree_attention(vllm_config)
    cls = CPUTreeSpeculator if serves(vllm_config, device) else TreeSpeculator
    return cls(vllm_config, device, options, req_states)
