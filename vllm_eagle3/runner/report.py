"""The one line at start-up that says what drafts, and with what."""

import logging
from typing import Any

from vllm_eagle3.checkpoint import DraftConfig

logger = logging.getLogger("vllm.eagle3")


def report(config: DraftConfig, runner: str, vllm_config: Any, form: str) -> None:
    """Log proposer, runner, layers, vocabulary and kernels (`form`) at info level."""
    speculative = vllm_config.speculative_config
    logger.info(
        "vllm-eagle3: drafting for %s on the %s runner (%s): %s, aux layers %s, draft vocabulary %d of %d, "
        "up to %d draft tokens",
        vllm_config.model_config.model,
        runner,
        form,
        config.dialect,
        list(config.aux_layers or ()),
        config.draft_vocab_size,
        config.vocab_size,
        speculative.num_speculative_tokens,
    )
