"""Reads tensors of any dialect: renames them, checks each shape, and resolves the vocabulary map."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from vllm_eagle3.checkpoint.aux_layers import SET_OPTION, USUAL
from vllm_eagle3.checkpoint.config import DraftConfig
from vllm_eagle3.checkpoint.errors import CheckpointError
from vllm_eagle3.checkpoint.values import FP8_DTYPES, PACKED_DTYPES, check_dtype, check_finite, check_scales
from vllm_eagle3.checkpoint.vocab_map import resolve_vocab_map

LAYER = "layers.0."
OLD_LAYER = "midlayer."
OLD_NAMES = {f"aux_norm_{x}.weight": f"fc_norm.{i}.weight" for i, x in enumerate(("low", "mid", "high"))}
# Last components of the tensors that quantised checkpoints carry beside or instead of `weight`
# (compressed-tensors, fp8, ModelOpt, AWQ/GPTQ, quantised KV caches).
PACKED_WEIGHTS = {"weight_packed", "qweight"}
QUANTISATION_PARAMETERS = PACKED_WEIGHTS | {
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "qzeros",
    "scales",
    "g_idx",
    "q_scale",
    "k_scale",
    "v_scale",
}

Shape = tuple[int, ...]


def expected_shapes(config: DraftConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Shapes by canonical name, of the required and of the optional tensors. d2t and t2d are not among them."""
    layer, h, ht = config.layer_config, config.hidden_size, config.target_hidden_size
    fused = config.num_aux_hidden_states * ht
    q_out = layer["num_attention_heads"] * layer["head_dim"]
    kv_out = layer["num_key_value_heads"] * layer["head_dim"]
    mlp = layer["intermediate_size"]
    attention, feed_forward = LAYER + "self_attn.", LAYER + "mlp."
    required: dict[str, Shape] = {
        "fc.weight": (h, fused),
        attention + "q_proj.weight": (q_out, 2 * h),
        attention + "k_proj.weight": (kv_out, 2 * h),
        attention + "v_proj.weight": (kv_out, 2 * h),
        attention + "o_proj.weight": (h, q_out),
        LAYER + "hidden_norm.weight": (h,),
        LAYER + "input_layernorm.weight": (h,),
        LAYER + "post_attention_layernorm.weight": (h,),
        feed_forward + "gate_proj.weight": (mlp, h),
        feed_forward + "up_proj.weight": (mlp, h),
        feed_forward + "down_proj.weight": (h, mlp),
        "norm.weight": (h,),
    }
    optional: dict[str, Shape] = {"lm_head.weight": (config.draft_vocab_size, h)}
    # The draft can use the target's embedding only if both have the same width.
    (optional if h == ht else required)["embed_tokens.weight"] = (config.vocab_size, h)
    if layer["model_type"] == "qwen3":
        required |= {attention + f"{x}_norm.weight": (layer["head_dim"],) for x in "qk"}
    if layer["attention_bias"]:
        sizes = {"q": q_out, "k": kv_out, "v": kv_out}
        required |= {attention + f"{x}_proj.bias": (n,) for x, n in sizes.items()}
        optional[attention + "o_proj.bias"] = (h,)
    if layer["mlp_bias"]:
        sizes = {"gate": mlp, "up": mlp, "down": h}
        required |= {feed_forward + f"{x}_proj.bias": (n,) for x, n in sizes.items()}
    if config.norm_before_fc:
        required["input_norm.weight"] = (fused,)
    if config.fc_norm:
        required |= {f"fc_norm.{i}.weight": (ht,) for i in range(config.num_aux_hidden_states)}
    return required, optional


def canonical_name(name: str) -> str:
    """The canonical name of a tensor of any dialect."""
    if name.startswith(OLD_LAYER):
        return LAYER + name.removeprefix(OLD_LAYER)
    return OLD_NAMES.get(name, name)


def canonical_tensors(
    config: DraftConfig,
    weights: Iterable[tuple[str, Tensor]],
    *,
    source: str,
    file_of: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Stream a draft's tensors in canonical form. All checks are done when the iterator ends.

    `d2t` (int64 offsets) and `t2d` (bool) come last, and only if the draft has its own vocabulary.
    If no `lm_head.weight` is yielded, the draft uses rows `i + d2t[i]` of the target's head. If no
    `embed_tokens.weight` is yielded, it uses the target's embedding. If the checkpoint's head covers the target's
    whole vocabulary, only the rows of the draft's vocabulary are yielded. If the attention has biases and
    o_proj.bias is missing, zeros are yielded for it.

    Args:
        config: from `resolve_config`.
        weights: (name, tensor) pairs in any order.
        source: the name used in errors about tensors that are not in `file_of`.
        file_of: file of each tensor by its original name.
        notes: findings are appended to it.

    Raises:
        CheckpointError: a tensor is unknown, missing, given twice or misshapen, or the map is wrong. Some of these
            are only found at the end.
    """
    if config.unsupported_reason:
        raise CheckpointError(f"{source}: vLLM's own EAGLE-3 serves this draft: {config.unsupported_reason}")
    stream = _Stream(config, source, file_of or {}, [] if notes is None else notes)
    for name, tensor in weights:
        if stream.accepts(name, tensor):
            yield canonical_name(name), tensor
    yield from stream.finish()


def refuse_another_model(config: DraftConfig, names: Iterable[str], source: str) -> None:
    """Raise CheckpointError for a language model instead of a draft, and for a wrong number of layers.

    The number is wrong if the tensors contradict config.json. Drafts that vLLM's own EAGLE-3 serves are checked too.
    """
    names = list(names)
    if not any(name.startswith("fc.") for name in names) and any(n.startswith("model.") for n in names):
        layers = config.layer_config.get("num_hidden_layers")
        raise CheckpointError(
            f"{source}: expected an EAGLE-3 draft, found a language model of {layers} layers (tensors model.*, no "
            "fc.weight). Is it the target?"
        )
    indices = {name.split(".")[1] for name in map(canonical_name, names) if name.startswith("layers.")}
    stated = config.layer_config.get("num_hidden_layers")
    if indices and isinstance(stated, int) and stated != len(indices):
        raise CheckpointError(
            f"{source}: config.json says num_hidden_layers is {stated}, but there are tensors of {len(indices)}"
        )


class _Stream:
    """The tensors seen so far, and those that are held back until the end: the maps, and a head that needs them."""

    def __init__(
        self, config: DraftConfig, source: str, file_of: Mapping[str, str], notes: list[str]
    ) -> None:
        self.config, self.source, self.file_of, self.notes = config, source, file_of, notes
        self.required, self.optional = expected_shapes(config)
        self.shapes = self.required | self.optional
        self.quantised = "quantization_config" in config.layer_config
        self.seen: dict[str, str] = {}
        self.held: dict[str, Tensor] = {}
        self.bias_dtype = torch.float32
        self.fp8: dict[str, str] = {}  # canonical name of each fp8 weight -> its original name

    def accepts(self, original: str, tensor: Tensor) -> bool:
        """Check one tensor. Returns True if it can be yielded now, False if it is held back or can be recomputed."""
        name, where = canonical_name(original), self.file_of.get(original, self.source)
        if name.endswith("rotary_emb.inv_freq"):
            return False
        if name in self.seen:
            raise CheckpointError(f"{where}: {original} and {self.seen[name]} are the same tensor, {name}")
        self.seen[name] = original
        if name in ("d2t", "t2d"):
            self.held[name] = tensor
            return False
        if tensor.is_floating_point():
            check_finite(original, tensor, where)
        parameter = name.rpartition(".")[2]
        if name not in self.shapes:
            if self.quantised and parameter in QUANTISATION_PARAMETERS:
                return True
            found = f"{original} {list(tensor.shape)}"
            raise CheckpointError(f"{where}: unknown tensor {found}{self._hint(name)}")
        check_dtype(original, tensor, where, self.quantised)
        if tensor.dtype in FP8_DTYPES:
            self.fp8[name] = original
        full_head = (self.config.vocab_size, self.config.hidden_size)
        if name == "lm_head.weight" and self.config.has_draft_vocab and tensor.shape == full_head:
            self.held[name] = tensor
            return False
        packed = self.quantised and tensor.dtype in PACKED_DTYPES
        if tensor.shape != self.shapes[name] and not packed:
            raise CheckpointError(
                f"{where}: {original}: expected {list(self.shapes[name])}, found {list(tensor.shape)}"
                f"{self._shape_hint(name, tensor)}"
            )
        if name == "embed_tokens.weight" and self.config.tie_word_embeddings:
            self.held[name] = tensor
        if name.endswith("q_proj.bias"):
            self.bias_dtype = tensor.dtype
        return True

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """Check that no tensor is missing, then yield those that were held back."""
        parts = [name.rpartition(".") for name in self.seen]
        have = self.seen.keys() | {f"{module}.weight" for module, _, last in parts if last in PACKED_WEIGHTS}
        missing = [f"{name} {list(shape)}" for name, shape in self.required.items() if name not in have]
        if missing:
            raise CheckpointError(f"{self.source}: missing tensors: {', '.join(missing)}")
        check_scales(self.fp8, have, self.file_of, self.source)
        target_ids = self._target_ids()
        head, embedding = self.held.get("lm_head.weight"), self.held.get("embed_tokens.weight")
        if head is not None:
            self.notes.append("lm_head: has the target's vocabulary; the rows of the draft's are taken")
        elif "lm_head.weight" not in have and embedding is not None:
            self.notes.append("lm_head: missing; the draft's own embedding is its head (tie_word_embeddings)")
            head = embedding
        if head is not None:
            if any(name.startswith("lm_head.") and name != "lm_head.weight" for name in have):
                raise CheckpointError(f"{self.source}: lm_head: rows of a quantised head cannot be selected")
            yield "lm_head.weight", head if target_ids is None else head[target_ids.to(head.device)]
        elif "lm_head.weight" not in have:
            self._head_from_target()
        if "embed_tokens.weight" not in have:
            self.notes.append("embed_tokens: missing, so the target's embedding")
        bias = LAYER + "self_attn.o_proj.bias"
        if bias in self.optional and bias not in have:
            self.notes.append("o_proj.bias: missing although attention_bias is true; zeros")
            yield bias, torch.zeros(self.config.hidden_size, dtype=self.bias_dtype)
        if target_ids is not None:
            t2d = torch.zeros(self.config.vocab_size, dtype=torch.bool)
            yield "d2t", target_ids - torch.arange(len(target_ids))
            yield "t2d", t2d.index_fill_(0, target_ids, True)

    def _target_ids(self) -> Tensor | None:
        """The target id of each draft id, [draft_vocab_size]; None if the vocabularies are the same."""
        d2t, t2d = self.held.get("d2t"), self.held.get("t2d")
        if not self.config.has_draft_vocab and d2t is None and t2d is None:
            return None
        where = self.file_of.get("d2t", self.file_of.get("t2d", self.source))
        vocab_size, draft_vocab_size = self.config.vocab_size, self.config.draft_vocab_size
        offsets, note = resolve_vocab_map(
            d2t, t2d, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size, source=where
        )
        if self.config.has_draft_vocab:
            self.notes.append(note)
            return offsets + torch.arange(draft_vocab_size)
        if offsets.any():
            raise CheckpointError(
                f"{where}: d2t: the draft has the target's vocabulary ({vocab_size} ids), so each id has to "
                f"map to itself; {int((offsets != 0).sum())} do not"
            )
        return None

    def _head_from_target(self) -> None:
        if self.config.hidden_size != self.config.target_hidden_size:
            raise CheckpointError(
                f"{self.source}: missing tensors: lm_head.weight {list(self.shapes['lm_head.weight'])}; the "
                f"target's head cannot be used, because its width is {self.config.target_hidden_size} and not "
                f"{self.config.hidden_size}"
            )
        rows = ", rows i + d2t[i]" if self.config.has_draft_vocab else ""
        self.notes.append(f"lm_head: missing, so the target's head{rows}")

    def _hint(self, name: str) -> str:
        """What an unknown tensor tells about an error in the config."""
        last = name.rpartition(".")[2]
        if name == "mask_hidden":
            return ": a P-EAGLE draft, but config.json has no mask_token_id"
        if last in QUANTISATION_PARAMETERS:
            return ": a quantised checkpoint, but config.json has no quantization_config"
        if last == "bias":
            return ": config.json says attention_bias or mlp_bias is false, or does not say"
        for flag, prefix in (("norm_before_fc", "input_norm."), ("fc_norm", "fc_norm.")):
            if name.startswith(prefix):
                return f": config.json does not say {flag} is true"
        if name.startswith("layers.") and not name.startswith(LAYER):
            return f": config.json says num_hidden_layers is {self.config.layer_config['num_hidden_layers']}"
        if last == "weight" and name.rpartition(".")[0].endswith(("q_norm", "k_norm")):
            return ": norms on q and k, but config.json describes a llama layer, not a qwen3 one"
        return f"; expected {', '.join(sorted(self.shapes))}, d2t, t2d (or {OLD_LAYER} for {LAYER})"

    def _shape_hint(self, name: str, tensor: Tensor) -> str:
        h, ht = self.config.hidden_size, self.config.target_hidden_size
        if name == "fc.weight" and tensor.shape == (h, 2 * h) and self.config.num_aux_hidden_states == USUAL:
            return ": that is an EAGLE-1 or EAGLE-2 draft"
        if name == "fc.weight":
            number, rest = divmod(tensor.shape[-1] if tensor.dim() == 2 else 0, ht)
            fits = number > 0 and not rest and tensor.shape[0] == h
            states = f"; its width is that of {number} states: {SET_OPTION} to {number} ids" if fits else ""
            return (
                f" (hidden_size {h}, {self.config.num_aux_hidden_states} x target_hidden_size {ht}{states})"
            )
        if name == "lm_head.weight":
            return f" (draft_vocab_size {self.config.draft_vocab_size}, hidden_size {h})"
        if name == "embed_tokens.weight":
            return f" (vocab_size {self.config.vocab_size}, hidden_size {h})"
        return ""
