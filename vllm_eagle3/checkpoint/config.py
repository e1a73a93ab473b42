"""Reads config.json of any dialect into `DraftConfig`, and notes how it resolved each convention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_eagle3.checkpoint.aux_layers import USUAL, AuxLayers, resolve_aux_layers
from vllm_eagle3.checkpoint.errors import CheckpointError
from vllm_eagle3.checkpoint.reader import MOST_POSITIONS, Reader, check_kinds
from vllm_eagle3.checkpoint.rope import resolve_rope
from vllm_eagle3.checkpoint.stock import LLAMA, left_to_stock
from vllm_eagle3.checkpoint.target import TargetFacts

# Keys of eagle_config that only ModelOpt writes.
MODELOPT_KEYS = {
    "use_input_layernorm_in_first_layer",
    "use_last_layernorm",
    "use_mtp_layernorm",
    "next_layer_regular",
    "parallel_draft_step",
    "parallel_draft_heads_num_layers",
    "norm_before_fc",
}
# Keys of the layer's config that are copied unchanged where they are present. The other keys are resolved here.
PASSED_ON = (
    "initializer_range",
    "attention_dropout",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "logit_scale",
    "quantization_config",
)


@dataclass(frozen=True)
class DraftConfig:
    """The canonical form of a draft's configuration.

    If `unsupported_reason` is set, vLLM's own EAGLE-3 serves the draft instead of this plugin. Then only `dialect`,
    `layer_config` (the layer's config as found) and `notes` are meaningful, and sizes that the config does not state
    are 0.
    """

    dialect: str
    """"safeailab", "specforge", "modelopt" or "speculators"."""
    layer_config: dict[str, Any]
    """Flat config of the layer, enough for HF's LlamaConfig or Qwen3Config (`layer_config["model_type"]`)."""
    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    """Rows of the target's embedding."""
    draft_vocab_size: int
    """Rows of the draft's lm_head; equal to `vocab_size` if the draft uses the target's whole vocabulary."""
    aux_layers: AuxLayers | None
    """After-k ids; None if the config names none and the target's number of layers is unknown."""
    max_position_embeddings: int
    num_aux_hidden_states: int = USUAL
    """How many states of the target fc joins."""
    use_aux_hidden_state: bool = True
    norm_before_residual: bool = False
    """The residual is hidden_norm(g), not g."""
    norm_before_fc: bool = False
    """One RMSNorm (`input_norm`) over the concatenated aux states, before fc."""
    fc_norm: bool = False
    """One RMSNorm per aux state (`fc_norm.{0,1,2}`), before fc."""
    norm_output: bool = False
    """The next draft step gets norm(a), not a."""
    tie_word_embeddings: bool = False
    """Without a shipped lm_head, the rows of a shipped embedding are the head."""
    notes: tuple[str, ...] = ()
    """What was resolved and why, one sentence each."""
    unsupported_reason: str | None = None

    @property
    def has_draft_vocab(self) -> bool:
        """The draft's vocabulary is a part of the target's, so d2t is needed."""
        return self.draft_vocab_size != self.vocab_size


def resolve_config(
    config: Mapping[str, Any],
    *,
    source: str,
    target_config: Mapping[str, Any] | None = None,
    aux_layers: Any = None,
) -> DraftConfig:
    """The canonical form of a draft's config.json of any dialect.

    Args:
        config: the parsed config.json.
        source: the name used in error messages, usually the path of config.json.
        target_config: the target's parsed config.json (multimodal ones nest the text model), which the draft must fit.
        aux_layers: after-k ids that override the checkpoint's (option `aux_layers`).

    Raises:
        CheckpointError: the config is wrong or ambiguous, or the draft was made for another target.
    """
    check_kinds(config, source)
    dialect = _dialect(config)
    reader = _layer_reader(config, dialect, source)
    if reason := left_to_stock(config, reader.values):
        return _unsupported(dialect, config, reader.values, reason)

    notes = [f"dialect: {dialect}"]
    layer_config = _layer_config(reader, config, notes)
    flags = Reader(config, source)
    _refuse_unknown_forward(flags.mapping("eagle_config"), source)
    vocab_size = reader.size("vocab_size")
    target_hidden_size = flags.size("target_hidden_size", default=layer_config["hidden_size"])

    target = None
    if target_config is not None:
        target = TargetFacts.from_config(target_config)
        target.check(hidden_size=target_hidden_size, vocab_size=vocab_size, source=source)
        notes += target.notes(layer_config["max_position_embeddings"], _verifier(config))
    number = _number_of_states(flags)
    aux, note = resolve_aux_layers(
        config,
        is_speculators=dialect == "speculators",
        num_target_layers=target.num_layers if target else None,
        override=aux_layers,
        stated_number=number,
        source=source,
    )
    notes.append(note)
    return DraftConfig(
        dialect=dialect,
        layer_config=layer_config,
        hidden_size=layer_config["hidden_size"],
        target_hidden_size=target_hidden_size,
        vocab_size=vocab_size,
        draft_vocab_size=_draft_vocab_size(flags, vocab_size),
        aux_layers=aux,
        max_position_embeddings=layer_config["max_position_embeddings"],
        num_aux_hidden_states=len(aux) if aux else number or USUAL,
        tie_word_embeddings=layer_config["tie_word_embeddings"],
        **_norms(flags, dialect, notes),
        notes=tuple(notes),
    )


def _layer_reader(config: Mapping[str, Any], dialect: str, source: str) -> Reader:
    """A reader of the keys that describe the decoder layer: speculators nests them."""
    reader = Reader(config, source)
    if dialect == "speculators":
        reader = Reader(reader.mapping("transformer_layer_config", required=True), source)
        check_kinds(reader.values, source)
    return reader


def _norms(flags: Reader, dialect: str, notes: list[str]) -> dict[str, Any]:
    """Which of the optional norms the draft has, as fields of DraftConfig."""
    if dialect == "speculators" and flags.values.get("norm_before_residual") is None:
        norm_before_residual = True
        notes.append(
            "norm_before_residual: MISSING; speculators' trainer means true, its config class false; true is "
            "taken, as vLLM does. If acceptance is low, state it in config.json"
        )
    else:
        norm_before_residual = flags.flag("norm_before_residual")
    nested = Reader(flags.mapping("eagle_config"), flags.source)
    return {
        "norm_before_residual": norm_before_residual,
        "norm_before_fc": nested.flag("norm_before_fc", default=flags.flag("norm_before_fc")),
        "fc_norm": flags.flag("fc_norm") or flags.flag("use_aux_norm"),
        "norm_output": flags.flag("norm_output"),
    }


def _draft_vocab_size(flags: Reader, vocab_size: int) -> int:
    """Rows of the draft's head: as many as the target's, unless the config says fewer."""
    draft_vocab_size = flags.size("draft_vocab_size", default=vocab_size)
    if draft_vocab_size > vocab_size:
        raise CheckpointError(
            f"{flags.source}: draft_vocab_size {draft_vocab_size} exceeds vocab_size {vocab_size}"
        )
    return draft_vocab_size


def _number_of_states(flags: Reader) -> int | None:
    """How many of the target's states the draft fuses, if config.json says so."""
    numbers = {
        key: flags.size(key)
        for key in ("num_aux_hidden_states", "num_aux_layers")
        if flags.values.get(key) is not None
    }
    if len(set(numbers.values())) > 1:
        raise CheckpointError(f"{flags.source}: contradictory numbers of aux hidden states: {numbers}")
    return next(iter(numbers.values()), None)


def _dialect(config: Mapping[str, Any]) -> str:
    if "speculators_model_type" in config or "transformer_layer_config" in config:
        return "speculators"
    nested = config.get("eagle_config")
    if isinstance(nested, Mapping) and MODELOPT_KEYS & nested.keys():
        return "modelopt"
    if nested is not None or "LlamaForCausalLMEagle3" in (config.get("architectures") or []):
        return "specforge"
    return "safeailab"


def _layer_config(reader: Reader, config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The layer's config in canonical form: every size stated, transformers-5 style rope."""
    layer, source = reader.values, reader.source
    family = _family(config, layer)
    rope, rope_notes = resolve_rope(layer, source=source)
    notes += rope_notes
    heads, hidden_size = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv_heads = reader.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{source}: {heads} attention heads are not a multiple of {kv_heads} key/value heads"
        )
    if layer.get("head_dim") is None and hidden_size % heads:
        raise CheckpointError(
            f"{source}: no head_dim, and hidden_size {hidden_size} is not a multiple of {heads} attention heads"
        )
    if (act := layer.get("hidden_act", "silu")) != "silu":
        raise CheckpointError(f"{source}: hidden_act: expected 'silu', found {act!r}")
    if layer.get("rms_norm_eps") is None:
        notes.append("rms_norm_eps: missing, so transformers' default 1e-06")
    passed_on = {key: layer[key] for key in PASSED_ON if layer.get(key) is not None}
    if config.get("quantization_config") is not None:
        passed_on["quantization_config"] = config["quantization_config"]
    layer_type = (layer.get("layer_types") or ["full_attention"])[0]
    sliding = layer_type == "sliding_attention"
    return passed_on | {
        "model_type": family,
        "hidden_size": hidden_size,
        "intermediate_size": reader.size("intermediate_size"),
        "num_hidden_layers": reader.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": reader.size("head_dim", default=hidden_size // heads),
        "vocab_size": reader.size("vocab_size"),
        "max_position_embeddings": reader.size("max_position_embeddings", most=MOST_POSITIONS),
        "hidden_act": "silu",
        "rms_norm_eps": layer.get("rms_norm_eps") or 1e-6,
        "rope_parameters": rope,
        "attention_bias": reader.flag("attention_bias"),
        "mlp_bias": reader.flag("mlp_bias"),
        "tie_word_embeddings": reader.flag("tie_word_embeddings"),
        "layer_types": [layer_type],
        "use_sliding_window": sliding,
        "sliding_window": reader.size("sliding_window") if sliding else None,
    }


def _family(config: Mapping[str, Any], layer: Mapping[str, Any]) -> str:
    """Llama or qwen3 (norms on q and k): from the architecture if vLLM decides by it, else from the model type."""
    if layer is not config:
        return layer.get("model_type", "llama")
    return "llama" if config["architectures"][0] in LLAMA else "qwen3"


def _refuse_unknown_forward(nested: Mapping[str, Any], source: str) -> None:
    """Refuse ModelOpt's other forms of the layer. vLLM ignores these switches, and the draft would produce noise."""
    wanted = (
        ("use_input_layernorm_in_first_layer", True),
        ("use_last_layernorm", True),
        ("use_mtp_layernorm", False),
    )
    for key, value in wanted:
        if nested.get(key) not in (None, value):
            raise CheckpointError(
                f"{source}: eagle_config.{key}: expected {value}, found {nested[key]!r}: neither vLLM nor "
                "this plugin computes this variant of the layer"
            )


def _verifier(config: Mapping[str, Any]) -> Mapping[str, Any]:
    verifier = (config.get("speculators_config") or {}).get("verifier")
    return verifier if isinstance(verifier, Mapping) else {}


def _unsupported(
    dialect: str, config: Mapping[str, Any], layer: Mapping[str, Any], reason: str
) -> DraftConfig:
    def size(key: str, default: int = 0) -> int:
        value = config.get(key, layer.get(key))
        return value if isinstance(value, int) else default

    return DraftConfig(
        dialect=dialect,
        layer_config=dict(layer),
        hidden_size=size("hidden_size"),
        target_hidden_size=size("target_hidden_size", size("hidden_size")),
        vocab_size=size("vocab_size"),
        draft_vocab_size=size("draft_vocab_size", size("vocab_size")),
        aux_layers=None,
        max_position_embeddings=size("max_position_embeddings"),
        notes=(f"dialect: {dialect}", f"left to stock vLLM: {reason}"),
        unsupported_reason=reason,
    )
