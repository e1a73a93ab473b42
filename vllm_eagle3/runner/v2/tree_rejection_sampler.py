"""The rejection sampler of Model Runner V2 for draft trees."""

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_eagle3.runner.v2.tree_state import TreeState
from vllm_eagle3.tree.acceptance import accept
from vllm_eagle3.tree.drawn import accept_drawn


class TreeRejectionSampler(RejectionSampler):
    """Verifies trees: the target draws a token at each node, and `tree.acceptance.accept` follows the draws.

    Trees whose nodes were drawn from the draft's distribution are verified by `tree.drawn.accept_drawn`.

    The noise of a draw depends on (seed, base + depth), as in plain sampling at that position. So with a seed per
    request, the output with trees equals the output without speculation, token for token.
    """

    def __init__(self, tree_state: TreeState, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tree_state = tree_state

    def _verify(self, logits: torch.Tensor, draft_logits: torch.Tensor | None, draft_sampled: torch.Tensor,
                pos: torch.Tensor, cu_num_logits: torch.Tensor, idx_mapping: torch.Tensor,
                idx_mapping_np: np.ndarray, expanded_idx_mapping: torch.Tensor, expanded_local_pos:
                torch.Tensor, seq_lens_upper_bound_np: np.ndarray, verify_draft_sampled: torch.Tensor,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        trees, states = self.tree_state, self.sampler.sampling_states
        node = expanded_local_pos.long()
        position = pos - node + trees.depth[expanded_idx_mapping, node]
        processed = self.sampler.apply_sampling_params(
            logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, position, draft_sampled,
            expanded_local_pos, seq_lens_upper_bound_np,
        )  # fmt: skip
        drawn = gumbel_sample(
            processed, expanded_idx_mapping, states.temperature.gpu, states.seeds.gpu, position,
            apply_temperature=False, is_drafting=False, use_fp64=self.sampler.use_fp64_gumbel,
        )  # fmt: skip

        first, last = cu_num_logits[:-1].long()[:, None], cu_num_logits[1:].long()[:, None]
        rows, used = trees.node_rows(first, last - first)
        tokens = torch.where(used, verify_draft_sampled[rows].long(), -1)
        parents = trees.parents[idx_mapping]
        path, emitted, count = accept(parents, tokens, drawn[rows])
        if trees.draws is not None:
            at = trees.drawn[idx_mapping].nonzero()[
                :, 0
            ]  # only on a CPU, where nodes are drawn and this does not wait
            if len(at):
                path[at], emitted[at], count[at] = accept_drawn(
                    parents[at], tokens[at], processed, rows[at], trees.drawn_trees(idx_mapping[at])
                )
        trees.record_path(idx_mapping, path)

        # Logprobs and sampling masks take row i for the i-th emitted token, so the path's rows are moved to the front.
        if states.max_num_logprobs(idx_mapping_np) != -1 or self.sampler.return_sampling_mask:
            order = torch.arange(len(logits), device=logits.device)
            order[rows] = rows.gather(1, path)
            in_place = processed is logits
            logits.copy_(logits[order])
            processed = logits if in_place else processed[order]
        return processed, emitted, count
