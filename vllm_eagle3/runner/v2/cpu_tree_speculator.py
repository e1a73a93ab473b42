"""The speculator that grows draft trees on a CPU, where there are no CUDA graphs."""

from typing import Any

import torch

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.kernels import cpu
from vllm_eagle3.runner.v2.cpu_speculator import NOT_DRAFTED, CPUSpeculator, StoppedChains
from vllm_eagle3.runner.v2.grafts import Found
from vllm_eagle3.runner.v2.tree_attention import PathMetadata
from vllm_eagle3.runner.v2.tree_draws import TreeDraws
from vllm_eagle3.runner.v2.tree_speculator import TreeSpeculator
from vllm_eagle3.runner.v2.tree_state import TreeState
from vllm_eagle3.tree.growth import UNUSED, Growth

ENOUGH = 5.0  # tokens expected of a look-up, beside which a draft adds less than its steps cost: a guess


class CPUTreeSpeculator(TreeSpeculator, CPUSpeculator):
    """TreeSpeculator whose steps are those of CPUSpeculator.

    Weights may be in int8, and a level computes only what it needs. One C++ call does all work between two levels.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.growth = cpu.Growth if cpu.native() else Growth

    def set_attn(self, model_state: Any, *args: Any, **kwargs: Any) -> None:
        super().set_attn(model_state, *args, **kwargs)
        StoppedChains.trees = model_state.tree_state

    def make_draws(self, tree_state: TreeState) -> TreeDraws | None:
        """Nodes are drawn here, because no graph of the growth holds the likeliest children."""
        options = Eagle3Options.from_additional_config(self.vllm_config.additional_config)
        if options.draft_sampling != "auto":
            return None
        return TreeDraws(self.model, self.tree, tree_state, self.scratch_keys.dtype)

    @property
    def grows(self) -> bool:
        """Whether this step grows trees. Otherwise CPUSpeculator makes chains, which may stop early."""
        return self.shape.width > 1 or (self.draws is not None and self.draws.active)

    def first_drafts(self) -> int:
        return super().first_drafts() if self.grows else self.shape.depth

    def _grow(self, input_batch: Any, nodes: int, attend: bool) -> None:
        if self.grows:
            super()._grow(input_batch, nodes, attend)
            return
        batch = input_batch.num_reqs
        chains, parents = self.draft_tokens[:batch, :nodes], self.parents[:batch, :nodes]
        missing = chains == NOT_DRAFTED
        parents.copy_(torch.arange(nodes)).masked_fill_(missing, UNUSED)
        chains.masked_fill_(missing, 0)
        values = self.values[:batch, :nodes].zero_()  # drafts of unknown probability keep their places
        for step, probability in enumerate(self.chain_probabilities):
            values[:, step:] = probability.log()[:, None]
        values.masked_fill_(missing, float("-inf"))

    def drafts_beside(self, found: Found, decoding: torch.Tensor) -> bool:
        """Under policy auto nothing is drafted where every request has a continuation worth ENOUGH tokens."""
        return not self.may_stop or bool((found.survival.sum(dim=1) < ENOUGH)[decoding].any())

    def mark_unused(self, drafts: torch.Tensor, requests: torch.Tensor) -> None:
        """Set unused nodes to NOT_DRAFTED, so that the scheduler does not let the target verify them."""
        if self.tree_state is not None and not self.vllm_config.scheduler_config.async_scheduling:
            parents = self.tree_state.parents[requests, 1 : drafts.shape[1] + 1]
            drafts.masked_fill_(parents == UNUSED, NOT_DRAFTED)

    def first_step(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The first draft step. Its states are kept, because the tree grows from them."""
        normed, states = super().first_step(*args, **kwargs)
        self.hidden_states[: len(states)] = states
        return normed, states

    def draft_level(
        self, level: cpu.Level, metadata: PathMetadata | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.step(level.tokens, level.states, level.positions, None, metadata)

    def _path_metadata(self, batch: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The slots of the draft's layer. `first_step` makes the metadata of its queries."""
        slots = self.block_tables.compute_slot_mappings(
            batch.idx_mapping, batch.query_start_loc, batch.positions, batch.num_tokens
        )
        return {}, {self.draft_attn_layer_name: slots[self._group()]}
