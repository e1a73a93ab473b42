"""Corrects vLLM's configuration of the draft by what the checkpoint means, before vLLM builds the draft."""

import logging
from functools import lru_cache
from typing import Any

from vllm.config import VllmConfig
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_eagle3.checkpoint import CheckpointError, DraftConfig, resolve_config
from vllm_eagle3.config import Eagle3Options

logger = logging.getLogger("vllm.eagle3")

# model_type of the draft's layer -> architecture name, registered in `plugin.py`.
ARCHITECTURES = {"llama": "VllmEagle3LlamaDraft", "qwen3": "VllmEagle3Qwen3Draft"}


def draft_config(vllm_config: VllmConfig) -> DraftConfig:
    """The canonical configuration of the draft that `speculative_config` names.

    Raises:
        CheckpointError: the draft's config.json is missing, wrong, ambiguous or made for another target.
        ValueError: a bad option in `additional_config`.
    """
    options = Eagle3Options.from_additional_config(vllm_config.additional_config)
    speculative = vllm_config.speculative_config
    assert speculative is not None
    model = speculative.draft_model_config
    target = vllm_config.model_config
    return _resolve(model.model, model.revision, target.model, target.revision, options.aux_layers)


@lru_cache(maxsize=8)
def _resolve(
    draft: str, revision: str | None, target: str, target_revision: str | None, aux_layers: Any
) -> DraftConfig:
    config = get_hf_file_to_dict("config.json", draft, revision)
    if config is None:
        raise CheckpointError(f"{draft}: expected a draft with a config.json, found none")
    target_config = get_hf_file_to_dict("config.json", target, target_revision)
    return resolve_config(
        config, source=f"{draft}/config.json", target_config=target_config, aux_layers=aux_layers
    )


def activate(vllm_config: VllmConfig) -> DraftConfig | None:
    """Resolve the draft and rewrite its `hf_config` in place, so that vLLM builds this project's draft model.

    Returns:
        The canonical configuration, or None if vLLM itself serves the draft: for other methods, and for drafts that
        this project does not support, which one warning explains.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "eagle3":
        return None
    if speculative.parallel_drafting:
        _warn_left("parallel_drafting is set")
        return None
    config = draft_config(vllm_config)
    if config.unsupported_reason is not None:
        _warn_left(config.unsupported_reason)
        return None
    if config.aux_layers is None:
        raise CheckpointError(
            f"{speculative.draft_model_config.model}: expected a target whose config states its number of layers, from "
            "which the layers that the draft reads follow, found none. Set additional_config "
            '{"eagle3": {"aux_layers": [low, mid, high]}}'
        )
    _rewrite(speculative.draft_model_config, config, vllm_config.model_config.max_model_len)
    for note in config.notes:
        logger.info("vllm-eagle3: %s", note)
    return config


def _warn_left(reason: str) -> None:
    logger.warning("vllm-eagle3: vLLM's own EAGLE-3 serves this draft: %s", reason)


def _rewrite(model: Any, config: DraftConfig, max_model_len: int) -> None:
    """Write every resolved convention into hf_config, which both of vLLM's runners read."""
    hf = model.hf_config
    hf.architectures = [ARCHITECTURES[config.layer_config["model_type"]]]
    hf.eagle_aux_hidden_state_layer_ids = list(config.aux_layers or ())
    hf.eagle_config = {"use_aux_hidden_state": True, "norm_before_fc": config.norm_before_fc}
    hf.draft_vocab_size = config.draft_vocab_size
    hf.target_hidden_size = config.target_hidden_size
    hf.num_aux_hidden_states = hf.num_aux_layers = config.num_aux_hidden_states  # llama's and qwen3's name
    for flag in ("norm_before_residual", "fc_norm", "norm_output"):
        setattr(hf, flag, getattr(config, flag))
    # Trainers state the length that they trained on, and vLLM sizes the table of rotations by it. Without scaling the
    # table has the same values however long it is, so it is made as long as the sequences are. With scaling, vLLM
    # takes the size from the scaling settings.
    rope_type = (config.layer_config["rope_parameters"] or {}).get("rope_type", "default")
    if rope_type == "default":
        hf.max_position_embeddings = max_model_len
        model.max_model_len = max_model_len
