"""The ledger: every name of vLLM that this project replaces, and how.

Nothing of vLLM is imported here: a replacement is made when vLLM itself imports the module that holds the name.
"""

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType

from vllm_eagle3.runner.post_import import after_import

logger = logging.getLogger("vllm.eagle3")


@dataclass(frozen=True)
class Patch:
    """One replaced name."""

    module: str
    """Module of vLLM in which the name is looked up."""
    name: str
    replacement: str
    """"module:attribute" of what stands in for it."""
    signature: str
    """Upstream's signature (of the function, or of the class's `__init__`) that the replacement was written for."""
    why: str
    until: str
    """When it can go."""
    checked: tuple[str, ...] = ("0.32.0", "0.33.0")
    """Versions of vLLM whose signature was compared."""

    def apply(self, module: ModuleType) -> None:
        target, attribute = self.replacement.split(":")
        setattr(module, self.name, getattr(importlib.import_module(target), attribute))
        logger.debug("vllm-eagle3: %s.%s is now %s", self.module, self.name, self.replacement)


LEDGER = (
    Patch(
        module="vllm.v1.worker.gpu_model_runner",
        name="EagleProposer",
        replacement="vllm_eagle3.runner.v1:Eagle3Proposer",
        signature="(self, vllm_config: VllmConfig, device: torch.device, runner=None)",
        why="the V1 runner builds its proposers in a closed if/elif; this is the name it calls for eagle3",
        until="vLLM has a registry of proposers (vllm-project/vllm#36219), or the V1 runner is gone",
    ),
    Patch(
        module="vllm.v1.worker.gpu.model_runner",
        name="init_speculator",
        replacement="vllm_eagle3.runner.v2:init_speculator",
        signature='(vllm_config: VllmConfig, device: torch.device, req_states: "RequestState")',
        why="the V2 runner builds its speculators in this function's closed if/elif",
        until="vLLM has a registry of speculators (vllm-project/vllm#36219)",
    ),
    Patch(
        module="vllm.utils.cpu_triton_utils",
        name="_expand_kernel_impl",
        replacement="vllm_eagle3.runner.cpu_fixes:expand",
        signature="(output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None)",
        why="on CPU it writes temperatures into a temporary, so sampled speculation reads uninitialised memory "
        "(vllm-project/vllm#55005)",
        until="vllm-project/vllm#55005 is fixed",
    ),
)


_installed = False


def install() -> None:
    """Arrange every replacement of the ledger in this process. Idempotent."""
    global _installed
    if not _installed:
        _installed = True
        after_import({patch.module: patch.apply for patch in LEDGER})
