"""Chains on vLLM's V2 model runner on a CPU, where there are no CUDA graphs."""

import copy
import gc
import logging
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.triton_utils import HAS_TRITON
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import prepare_prefill_inputs
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler

from vllm_eagle3.runner.chain import Confident, draft_chain
from vllm_eagle3.runner.policy_install import in_charge
from vllm_eagle3.runner.v2.chain_draws import ChainDraws, ChainModelState
from vllm_eagle3.runner.v2.speculator import Eagle3Speculator

logger = logging.getLogger("vllm.eagle3")
NOT_DRAFTED = -1


def serves(vllm_config: VllmConfig, device: torch.device) -> bool:
    """Whether CPUSpeculator can draft for this engine."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    assert speculative is not None
    return (
        device.type == "cpu"
        and not HAS_TRITON  # with Triton interpreted, an engine on a CPU tests the code for GPUs
        and not speculative.enable_adaptive_verification
        and not vllm_config.model_config.supports_multimodal_inputs
        and parallel.data_parallel_size == parallel.decode_context_parallel_size == 1
    )


def draws_chains(vllm_config: VllmConfig) -> bool:
    """Whether chains on a CPU are drawn by this project, which keeps distributions over the draft's vocabulary."""
    speculative = vllm_config.speculative_config
    assert speculative is not None
    drawn = speculative.draft_sample_method == "probabilistic"
    return drawn and speculative.rejection_sample_method == "standard"


def without_draws(vllm_config: VllmConfig) -> VllmConfig:
    """The config with drafts that vLLM does not draw."""
    config, speculative = copy.copy(vllm_config), copy.copy(vllm_config.speculative_config)
    assert speculative is not None
    speculative.draft_sample_method = "greedy"
    config.speculative_config = speculative
    return config


class CPUSpeculator(Eagle3Speculator):
    """Eagle3Speculator whose steps run only over the rows that draft, without vLLM's padded and compiled forward pass.

    For other rows only keys and values are computed. Weights may be in int8. With policy "auto" a chain stops when its
    probability becomes too low.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.draws_chains = draws_chains(vllm_config)
        if self.draws_chains:  # so vLLM keeps no distributions over the target's vocabulary
            super().__init__(without_draws(vllm_config), device)
            self.vllm_config = vllm_config
        else:
            super().__init__(vllm_config, device)
        self.chain_draws: ChainDraws | None = None
        self.chain_probabilities: list[
            torch.Tensor
        ] = []  # of the last step's chains, as draft_chain tells them
        self.may_stop = (
            in_charge(vllm_config)
            and not vllm_config.scheduler_config.async_scheduling  # which has announced the number of drafts already
            and vllm_config.parallel_config.world_size == 1  # otherwise no rank sees all logits
        )

    def load_model(self, target_model: torch.nn.Module) -> None:
        draws = self.draws_chains
        if draws and resolve_model_state_cls(self.vllm_config, target_model) is not DefaultModelState:
            logger.warning(
                "vllm-eagle3: no drafts are drawn, because the target has a model state of its own"
            )
            draws = False
        if draws:
            # vLLM asks the target for this hook. It is set on the instance.
            target_model.get_model_state_cls = lambda: ChainModelState  # type: ignore[assignment]
        super().load_model(target_model)
        if draws:
            dtype = self.hidden_states.dtype
            self.chain_draws = ChainDraws(self.model, self.max_num_reqs, self.num_speculative_steps, dtype)
        (self.draft_layer,) = self.draft_attn_layer_names
        gc.collect()  # weights that loading has replaced print an error if they are freed while torch.compile traces

    def set_attn(self, model_state: Any, *args: Any, **kwargs: Any) -> None:
        super().set_attn(model_state, *args, **kwargs)
        StoppedChains.trees = None
        if self.chain_draws is not None:
            model_state.draws = self.chain_draws

    # Long: a third is vLLM's signature.
    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft ids [num_reqs, num_speculative_tokens], NOT_DRAFTED after a chain's end. Arguments as upstream's."""
        batch, tokens = input_batch.num_reqs, input_batch.num_tokens
        g = self.model.fuse(aux_hidden_states) if aux_hidden_states else last_hidden_states
        if dummy_run:
            return self._profile(g[:tokens], batch)
        self._copy_request_inputs(batch, input_batch.idx_mapping, temperature, seeds)
        prepare_prefill_inputs(
            self.last_token_indices, self.current_draft_step, self.input_buffers, input_batch, num_sampled,
            num_rejected, last_sampled, next_prefill_tokens, self.max_num_reqs,
        )  # fmt: skip
        greedy = not bool(self.temperature[input_batch.idx_mapping].any())
        may_stop = self.may_stop and (greedy or self.draft_logits is None)
        most = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        drafts = self.draft_tokens[:batch]
        drafts.fill_(NOT_DRAFTED)
        rows = self.last_token_indices[:batch]
        buffers = self.input_buffers
        positions = buffers.positions[:tokens]
        first_positions = positions[rows]
        inputs = (buffers.input_ids[:tokens], g[:tokens], positions, slot_mappings[self.draft_layer][:tokens])
        if most == 0:  # only extend the draft's KV cache as the target's
            self.model.write_keys_values(*inputs)
            return drafts
        buffers.query_start_loc[: batch + 1] = torch.arange(batch + 1, dtype=torch.int32)
        buffers.seq_lens[:batch] = input_batch.seq_lens[:batch] - num_rejected
        longest = input_batch.seq_lens_cpu_upper_bound[:batch]
        self.draft_max_seq_len = min(int(longest.max()) + most, self.max_model_len)
        first = self.first_step(*inputs, self._metadata(batch, longest, 0), rows=rows)
        buffers.positions[:batch] = first_positions
        chain = draft_chain(
            first,
            most,
            lambda index, ids, state: self._next_step(batch, longest, index, ids, state),
            lambda index, states: self._sample(batch, first_positions, index, states, greedy),
            self._confident(input_batch.idx_mapping) if may_stop else None,
        )
        self.chain_probabilities = chain.probabilities
        made = torch.stack(chain.ids, dim=1)
        drafts[:, : made.shape[1]] = made
        if may_stop:
            drafts.masked_fill_(torch.arange(drafts.shape[1]) >= chain.lengths[:, None], NOT_DRAFTED)
        return drafts

    def first_step(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft step over the rows that the target has just computed. Arguments and result as in `model.step`."""
        return self.model.step(*args, **kwargs)

    def _next_step(
        self, batch: int, longest: torch.Tensor, index: int, ids: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step of all requests at the next position, at most the last one of the longest sequence."""
        buffers = self.input_buffers
        positions = buffers.positions[:batch].add_(1).clamp_(max=self.max_model_len - 1)
        buffers.seq_lens[:batch].add_(1).clamp_(max=self.max_model_len)
        slots = self.block_tables.compute_slot_mappings(
            self.idx_mapping[:batch], buffers.query_start_loc[: batch + 1], positions, batch
        )
        return self.model.step(
            ids.to(buffers.input_ids.dtype),
            state,
            positions,
            slots[self._group()],
            self._metadata(batch, longest, index),
        )

    def _confident(self, requests: torch.Tensor) -> Confident:
        """What gives drafts with their probabilities, drawn if some of these requests draws."""
        draws = self.chain_draws
        if draws is None or not draws.active(requests):
            return lambda index, states: self.model.get_confident_tokens(states)
        return lambda index, states: draws.draw(states, requests, self.temperature, index)

    def _sample(
        self, batch: int, first_positions: torch.Tensor, index: int, hidden_states: torch.Tensor, greedy: bool
    ) -> torch.Tensor:
        requests = self.idx_mapping[:batch]
        if self.chain_draws is not None and self.chain_draws.active(requests):
            return self.chain_draws.draw(hidden_states, requests, self.temperature, index)[0]
        # Where no request samples, nothing reads the draft's distribution.
        if greedy and self.draft_logits is not None:
            return self.model.get_top_tokens(hidden_states)
        # A draw is keyed by the position before the sampled token: one behind the row that the first step drafts from.
        return self.sample_draft(
            hidden_states,
            first_positions + 1 + index,
            self.idx_mapping[:batch],
            self.temperature,
            self.seeds,
            self.current_draft_step.fill_(index),
            self.draft_logits,
        )

    def _metadata(self, batch: int, longest: torch.Tensor, index: int) -> Any:
        """Attention metadata of the draft's layer with one query per request, from the present buffers."""
        eager = BatchExecutionDescriptor(CUDAGraphMode.NONE, batch, None)
        metadata = self._build_uniform_attn_metadata(eager, batch, 1, longest, index)
        assert metadata is not None
        return metadata[self.draft_layer]

    def _group(self) -> int:
        """KV cache group of the draft's layer."""
        groups = self.kv_cache_config.kv_cache_groups
        return next(i for i, group in enumerate(groups) if self.draft_layer in group.layer_names)

    def _profile(self, g: torch.Tensor, batch: int) -> torch.Tensor:
        """Warm-up and profiling: the layer without attention. Compiles nothing that serving does not use."""
        tokens = len(g)
        with set_forward_context(None, self.vllm_config, num_tokens=tokens):
            buffers = self.input_buffers
            hidden_states, _ = self.model.step(
                buffers.input_ids[:tokens], g, buffers.positions[:tokens], None, None
            )
            self.model.get_top_tokens(hidden_states[:batch])
        return self.draft_tokens[:batch].zero_()


class StoppedChains(DraftTokensHandler):
    """Tells the scheduler how many drafts each request has, and the counts of the last step's grafts.

    Upstream's tells it of the step's number of drafts.
    """

    lengths: list[int] | None = None
    trees: Any = None  # the TreeState of this process's engine, if it drafts trees; set on the class

    def set_draft_tokens(self, input_batch: Any, draft_tokens: torch.Tensor) -> None:
        super().set_draft_tokens(input_batch, draft_tokens)
        self.lengths = None
        if draft_tokens.device.type == "cpu":  # a GPU would have to be waited for, and no chain stops there
            self.lengths = (draft_tokens != NOT_DRAFTED).sum(dim=1).tolist()

    def get_draft_tokens(self) -> Any:
        found = super().get_draft_tokens()
        if found is not None and self.lengths is not None:
            for ids, length in zip(found.draft_token_ids, self.lengths, strict=True):
                del ids[length:]
            found.grafts = self.trees and self.trees.graft_counts  # type: ignore[attr-defined]
        return found
