"""The EAGLE-3 draft as a vLLM module: vLLM's own layers, loaded from the canonical form, and a cheaper step for CPUs.

vLLM's `forward` runs the layer over all rows. It is used on GPUs, where CUDA graphs capture it. `step` is for CPUs: it
writes keys and values for all rows, but computes attention, MLP and output only for the rows that draft. A draft has
one layer, so nothing reads the output of the other rows.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.qwen3_eagle3 import Eagle3Qwen3ForCausalLM
from vllm.platforms import current_platform

from vllm_eagle3.checkpoint import canonical_tensors, refuse_unreadable
from vllm_eagle3.checkpoint.target_head import target_head_rows
from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.kernels import (
    MOST_ROWS,
    ROWS_OF_EACH_TILE,
    HeadTopK,
    concat_fc,
    cpu,
    finite,
    head_topk,
    quant_fp8,
    sharded_topk,
    top_children,
)
from vllm_eagle3.model.activate import draft_config
from vllm_eagle3.model.fp8 import Fp8Method, fp8_works, read_in_fp8
from vllm_eagle3.model.int8 import Int8Linear, int8_layers
from vllm_eagle3.model.ops import add_rms_norm, linear, rms_norm, silu_and_mul


class _DraftMixin(nn.Module):
    """What this project adds to vLLM's EAGLE-3 modules, which are the second base class."""

    config: Any
    model: Any
    lm_head: Any
    logits_processor: Any
    draft_id_to_target_id: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.draft_config = draft_config(vllm_config)
        options = Eagle3Options.from_additional_config(vllm_config.additional_config)
        self.fused_kernels, self.int8_draft = options.fused_kernels, options.int8_draft
        self.fp8_draft = options.fp8_draft
        self.most_children = options.tree.topk if options.tree is not None else 1  # of a node
        self.fp8_head: tuple[torch.Tensor, torch.Tensor] | None = None
        """The head's rows of this rank and their scales, for steps of few rows."""
        self.int8: dict[nn.Module, Int8Linear] = {}
        """Int8 layers that `step` and `draft_logits` use on a CPU, by the layer that they replace."""
        speculative = vllm_config.speculative_config
        assert speculative is not None
        self.source, target = speculative.draft_model_config.model, speculative.target_model_config
        self.target, self.target_revision = target.model, target.revision
        self.draft_to_target: torch.Tensor | None = None
        """[draft_vocab] int64: target id of each draft id; None if the vocabularies are equal."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensors of any dialect. Raises CheckpointError if one is missing, unknown, misshapen or unreadable."""
        try:
            tensors = dict(canonical_tensors(self.draft_config, weights, source=self.source))
        except (SafetensorError, OSError, RuntimeError) as error:
            refuse_unreadable(self.source, error)
        if self.draft_config.has_draft_vocab and "lm_head.weight" not in tensors:
            # vLLM itself would share the target's head and take its first rows for the draft's vocabulary.
            ids = tensors["d2t"].cpu() + torch.arange(self.draft_config.draft_vocab_size, device="cpu")
            tensors["lm_head.weight"] = target_head_rows(self.target, ids, self.target_revision)
        super().load_weights(tensors.items())  # type: ignore[misc]  # the base class comes second
        if current_platform.is_cpu():
            cpu.native()  # compile now, so that the first step does not wait
        offsets = self.draft_id_to_target_id
        if offsets is not None:
            self.draft_to_target = torch.arange(len(offsets), device=offsets.device) + offsets.data
        if self.int8_draft:
            attention, mlp = self.model.layers[0].self_attn, self.model.layers[0].mlp
            layers = [self.model.fc, attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]
            if "lm_head.weight" in tensors:  # otherwise vLLM shares the target's head after loading
                layers.append(self.lm_head)
            self.int8 = int8_layers(layers)

    def round_weights(self) -> None:
        """Make the fp8 weights, if the options ask for them and the device has fp8. To be called when all is loaded.

        `fc` is left as it is: its states have a few very large channels (docs/decisions.md).
        """
        if not (self.fp8_draft and fp8_works(self.model.norm.weight.device)):
            return
        attention, mlp = self.model.layers[0].self_attn, self.model.layers[0].mlp
        read_in_fp8([attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj])
        if self._fuses_head(self.model.norm.weight):
            self.fp8_head = quant_fp8(self._head_rows())

    def warm_up(self) -> None:
        """Compile the Triton kernels of `fuse` and of `top_children`, for any number of rows.

        vLLM's warm-up meets few numbers of rows, and a CUDA graph holds no `fuse`.
        """
        norm = self.model.norm.weight  # of any draft; a quantised fc may have no weight
        if not (self.fused_kernels and norm.is_cuda):
            return
        states, width = self.draft_config.num_aux_hidden_states, self.draft_config.target_hidden_size
        layers: list[Any] = [
            m for m in self.modules() if isinstance(getattr(m, "quant_method", None), Fp8Method)
        ]
        for rows in ROWS_OF_EACH_TILE:
            state = norm.new_zeros(rows, width)
            g = self.fuse([state] * states)
            for count in {1, self.most_children}:
                self.top_children(g, count)
            for layer in layers:
                layer.quant_method.apply(layer, g.new_zeros(rows, layer.weight.shape[1]))

    def _linear(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.int8[layer](x) if layer in self.int8 else linear(layer, x)

    def fuse(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """g [n, h] = fc([low; mid; high]) from the target's states, each [n, h_target]."""
        model, eps = self.model, self.config.rms_norm_eps
        norms = None if model.fc_norm is None else [norm.weight for norm in model.fc_norm]
        whole = model.input_norm.weight if model.norm_before_fc else None
        if (
            self.fused_kernels
            and states[0].is_cuda
            and type(model.fc.quant_method) is UnquantizedLinearMethod
        ):
            return concat_fc(states, model.fc.weight, norm_weights=norms, input_norm=whole, eps=eps)
        if norms is not None:
            states = [rms_norm(state, weight, eps) for state, weight in zip(states, norms, strict=True)]
        fused = torch.cat(tuple(states), dim=-1)
        fused = fused if whole is None else rms_norm(fused, whole, eps)
        return self.int8[model.fc](fused) if model.fc in self.int8 else model.fc(fused)

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """g [n, h] from the concatenated states [n, states * h_target].

        vLLM's own method norms strided chunks. Its CPU kernel reads them as if they were contiguous, so that with
        `fc_norm` every row but the first is wrong. `fuse` gives the kernel contiguous states.
        """
        return self.fuse(hidden_states.chunk(self.draft_config.num_aux_hidden_states, dim=-1))

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Most likely target ids [n] int64 for normed outputs [n, h]: argmax in the draft's vocabulary, then mapped."""
        if self.lm_head in self.int8:
            # In bf16 on a CPU, max is several times faster than argmax, which is not vectorised.
            ids = self.draft_logits(hidden_states).max(dim=-1).indices
        elif self._fuses_head(hidden_states):
            return self._head_topk(hidden_states, 1).ids[:, 0]
        else:
            ids = self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        return ids if self.draft_to_target is None else self.draft_to_target[ids]

    def get_confident_tokens(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`get_top_tokens`, and the draft's probability of each [n], for normed outputs [n, h]."""
        log_probs, ids = self.top_children(hidden_states, 1)
        return ids[:, 0], log_probs[:, 0].exp()

    def top_children(self, hidden_states: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k likeliest tokens [n, k] for normed outputs [n, h]: log-probabilities (fp32) and target ids."""
        if self._fuses_head(hidden_states):
            top = self._head_topk(hidden_states, k)
            return finite(top.logits - top.lse[:, None]), top.ids
        logits = self.draft_logits(hidden_states)
        if logits.device.type == "cpu":
            return cpu.top_children(logits, k, self.draft_to_target)
        log_probs, ids = top_children(logits, k)
        return log_probs, ids if self.draft_to_target is None else self.draft_to_target[ids]

    def _fuses_head(self, hidden_states: torch.Tensor) -> bool:
        plain = type(self.lm_head.quant_method) is UnquantizedEmbeddingMethod
        return self.fused_kernels and plain and (hidden_states.is_cuda or self.lm_head.tp_size > 1)

    def _head_topk(self, hidden_states: torch.Tensor, k: int) -> HeadTopK:
        d2t = None if self.draft_to_target is None else self.draft_id_to_target_id
        weight, scale = self._head_rows(), None
        if self.fp8_head is not None and len(hidden_states) <= MOST_ROWS:
            weight, scale = self.fp8_head
        options: dict[str, Any] = {
            "d2t": d2t, "logit_scale": self.logits_processor.scale, "weight_scale": scale
        }  # fmt: skip
        if self.lm_head.tp_size == 1:
            return head_topk(hidden_states, weight, k, **options)
        return sharded_topk(
            hidden_states, weight, k, vocab_start=self.lm_head.shard_indices.org_vocab_start_index,
            gather=tensor_model_parallel_all_gather, **options,
        )  # fmt: skip

    def _head_rows(self) -> torch.Tensor:
        """The rows of the head on this rank [rows, h], without padding."""
        shard = self.lm_head.shard_indices
        return self.lm_head.weight[: shard.org_vocab_end_index - shard.org_vocab_start_index]

    def draft_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [n, draft_vocab] for normed outputs [n, h], not scattered into the target's vocabulary."""
        if self.lm_head in self.int8:
            logits = self.int8[self.lm_head](hidden_states)[:, : self.draft_config.draft_vocab_size]
            return logits if self.logits_processor.scale == 1.0 else logits * self.logits_processor.scale
        return self.logits_processor(self.lm_head, hidden_states)

    def step(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor | None,
        attn_metadata: Any,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step over n rows of which r draft. For a CPU only: it calls vLLM's CPU kernels directly.

        Args:
            input_ids: [n] token after each row's state.
            hidden_states: [n, h] g of each row, or a of its parent.
            positions: [n] positions of the states.
            slot_mapping: [n] KV slots of the rows; None writes no KV (profiling, and levels of a tree).
            attn_metadata: the attention backend's metadata for r queries, one per request; None skips attention.
            rows: [r] indices of the rows that draft; None for all rows.

        Returns:
            (norm(a), the input of the next step in place of g), both [r, h].
        """
        layer, model, eps = self.model.layers[0], self.model, self.config.rms_norm_eps
        attention, attn = layer.self_attn, layer.self_attn.attn
        query, key, value, residual = self._attended(input_ids, hidden_states, positions)
        if slot_mapping is not None:
            attn.impl.do_kv_cache_update(attn, key, value, attn.kv_cache, slot_mapping)
        if rows is not None:
            query, residual = query[rows], residual[rows]
        query = query.view(-1, attention.num_heads, attention.head_dim)
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        attn.impl.forward(attn, query, key, value, attn.kv_cache, attn_metadata, output=context)
        output = self._linear(attention.o_proj, context.view(len(context), -1))
        output, residual = add_rms_norm(output, residual, layer.post_attention_layernorm.weight, eps)
        output = self._linear(layer.mlp.down_proj, silu_and_mul(self._linear(layer.mlp.gate_up_proj, output)))
        output, prenorm = add_rms_norm(output, residual, model.norm.weight, eps)
        return output, output if model.norm_output else prenorm

    def write_keys_values(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Keep the layer's cache in step with the target's where no row drafts. Arguments as `step`'s."""
        attn = self.model.layers[0].self_attn.attn
        _, key, value, _ = self._attended(input_ids, hidden_states, positions)
        attn.impl.do_kv_cache_update(attn, key, value, attn.kv_cache, slot_mapping)

    def _attended(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of n rows: query [n, heads * head_dim], key and value [n, kv_heads, head_dim], residual [n, h]."""
        layer, model, eps = self.model.layers[0], self.model, self.config.rms_norm_eps
        attention = layer.self_attn
        embeds = rms_norm(model.embed_tokens(input_ids), layer.input_layernorm.weight, eps)
        normed = rms_norm(hidden_states, layer.hidden_norm.weight, eps)
        residual = normed if self.draft_config.norm_before_residual else hidden_states
        qkv = self._linear(attention.qkv_proj, torch.cat([embeds, normed], dim=-1))
        query, key, value = self._rotated(attention, qkv, positions, eps)
        shape = (-1, attention.num_kv_heads, attention.head_dim)
        return query, key.view(shape), value.view(shape), residual

    @staticmethod
    def _rotated(
        attention: Any, qkv: torch.Tensor, positions: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        if hasattr(attention, "q_norm"):  # Qwen3: a norm per head
            heads = (-1, attention.head_dim)
            query = rms_norm(query.reshape(heads), attention.q_norm.weight, eps).view(query.shape)
            key = rms_norm(key.reshape(heads), attention.k_norm.weight, eps).view(key.shape)
        # vLLM's module would run its slower form when it is called outside of torch.compile.
        rotary = attention.rotary_emb
        rotate = rotary.forward_cpu if qkv.device.type == "cpu" else rotary.forward_cuda
        return *rotate(positions, query, key), value


class Eagle3LlamaDraft(_DraftMixin, Eagle3LlamaForCausalLM):
    """Draft with a Llama-style layer."""


class Eagle3Qwen3Draft(_DraftMixin, Eagle3Qwen3ForCausalLM):  # type: ignore[misc]  # load_weights returns a set there
    """Draft with a Qwen3-style layer (norms on q and k)."""
