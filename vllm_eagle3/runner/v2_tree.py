"""Drafting trees in Model Runner V2: the speculator that grows them. `tree_state` verifies them."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_eagle3.config import Eagle3Options, TreeOptions
from vllm_eagle3.drafting.tree import MOST_LOGITS, UNUSED, Expansion, Tree
from vllm_eagle3.runner.tree_attention import PathMetadata, select_tree_attention
from vllm_eagle3.runner.tree_state import TreeModelState, TreeStep
from vllm_eagle3.runner.tree_support import WAY_OUT, refuse_unsupported
from vllm_eagle3.runner.v2 import Eagle3Speculator


def make_tree_speculator(
    vllm_config: VllmConfig, device: torch.device, options: Eagle3Options
) -> "TreeSpeculator":
    """The speculator of an engine whose option `tree` is set. Call before the model is built: it picks the
    attention.

    Raises:
        ValueError: a setting of this engine that trees do not support; names all of them.
    """
    assert options.tree is not None
    refuse_unsupported(vllm_config, options.tree)
    select_tree_attention(vllm_config)
    return TreeSpeculator(vllm_config, device, options.tree)


class TreeSpeculator(Eagle3Speculator):
    """Grows a tree per request from the target's states along the accepted path.

    The first draft step is the chain's, run on the accepted path only. From its last row the tree grows level
    by level: one pass of the draft layer over the expanded nodes of all requests, their KV in scratch.
    """

    model: Any  # the draft, vllm_eagle3.model.draft

    def __init__(self, vllm_config: VllmConfig, device: torch.device, tree: TreeOptions) -> None:
        super().__init__(vllm_config, device)
        self.tree = tree
        self.root_children = (  # written by the first draft step: log-probabilities and ids
            torch.zeros(self.max_num_reqs, tree.topk, device=device),
            torch.zeros(self.max_num_reqs, tree.topk, dtype=torch.int64, device=device),
        )

    def load_model(self, target_model: torch.nn.Module) -> None:
        stock = resolve_model_state_cls(self.vllm_config, target_model)
        if stock is not DefaultModelState:
            raise ValueError(
                f"draft trees do not support targets whose model state is {stock.__name__}; {WAY_OUT}"
            )
        # vLLM's hook, set on the instance.
        target_model.get_model_state_cls = lambda: TreeModelState  # type: ignore[assignment]
        super().load_model(target_model)
        (self.draft_attn_layer_name,) = self.draft_attn_layer_names
        layer = self.vllm_config.compilation_config.static_forward_context[self.draft_attn_layer_name]
        slots = (self.tree.depth - 1) * self.tree.topk
        shape = (self.max_num_reqs, slots, layer.num_kv_heads, layer.head_size)
        self.scratch_keys = torch.zeros(shape, dtype=self.dtype, device=self.device)  # type: ignore[arg-type]
        self.scratch_values = torch.zeros_like(self.scratch_keys)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """The draft runs eagerly: its first step has rows of its own, which upstream's capture does not
        know.
        """
        super().init_cudagraph_manager(CUDAGraphMode.NONE)

    def capture(self) -> None:
        """Nothing to capture, see init_cudagraph_manager."""

    @torch.inference_mode()
    def propose(  # type: ignore[override]
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft ids [num_reqs, num_speculative_tokens], as upstream's; their parents go to the model state.

        A step's own num_speculative_tokens (where K depends on the batch) cuts the tree to its best nodes.
        """
        envelope = self.num_speculative_steps
        budget = envelope if num_speculative_tokens is None else num_speculative_tokens
        trees = self.model_state
        assert isinstance(trees, TreeModelState)
        step = trees.step
        if not dummy_run and step is not None and step.has_drafts:
            path = accepted_rows(input_batch, step, trees.path[step.requests], self.tree.depth)
            attn_metadata, slot_mappings = self._path_metadata(path.batch)
            input_batch = path.batch
            last_hidden_states = last_hidden_states[path.rows]
            aux_hidden_states = aux_hidden_states and [states[path.rows] for states in aux_hidden_states]
            num_rejected = (num_rejected - path.dropped).clamp(min=0)
        first = super().propose(
            input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
            num_rejected, *args, dummy_run=dummy_run, num_speculative_tokens=min(budget, 1), **kwargs,
        )  # fmt: skip
        if budget == 0:
            return first
        requests = input_batch.idx_mapping
        chain = torch.zeros_like(requests, dtype=torch.bool) if dummy_run else trees.chain_only[requests]
        tree = self._grow(input_batch, chain, min(budget, self.tree.nodes), attn_metadata is not None)
        tokens = self.draft_tokens[: input_batch.num_reqs]
        used = tree.tokens.shape[1]
        tokens[:, :used], tokens[:, used:] = tree.tokens, 0
        if not dummy_run:
            trees.parents[requests] = torch.nn.functional.pad(
                tree.parents, (1, envelope - used), value=UNUSED
            )
        return tokens

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Called by the first draft step with each request's last row: keeps the root's children."""
        log_probs, ids = self.model.top_children(hidden_states, self.tree.topk)
        self.root_children[0][: len(ids)] = log_probs
        self.root_children[1][: len(ids)] = ids
        return self.root_children[1][: len(ids), 0]

    def _grow(self, input_batch: Any, chain: torch.Tensor, nodes: int, attend: bool) -> Tree:
        """The trees of all requests, of a group at a time: a level's rows must be no more than the compiled draft
        takes, and their logits must fit."""
        rows = min(self.max_num_tokens, MOST_LOGITS // self.model.draft_config.draft_vocab_size)
        group = max(rows // self.tree.topk, 1)
        # A bound that the host knows.
        longest = input_batch.seq_lens_cpu_upper_bound[: input_batch.num_reqs]
        groups = [
            slice(i, min(i + group, input_batch.num_reqs)) for i in range(0, input_batch.num_reqs, group)
        ]
        trees = [self._grow_group(at, chain[at], nodes, int(longest[at].max()), attend) for at in groups]
        return Tree(*map(torch.cat, zip(*trees, strict=True)))

    def _grow_group(self, at: slice, chain: torch.Tensor, nodes: int, longest: int, attend: bool) -> Tree:
        batch, topk = at.stop - at.start, self.tree.topk
        expansion = Expansion(topk, chain)
        frontier = expansion.grow(*(children[at, None] for children in self.root_children))
        states = self.hidden_states[at, None]  # the state that each node's parent hands on
        last = self.input_buffers.positions[at, None]  # row that the tree grows from
        paths = torch.zeros(batch, 1, 0, dtype=torch.int64, device=self.device)
        block_table = self.block_tables.input_block_tables[self._group()][at]
        for level in range(1, min(self.tree.depth, nodes)):  # a path of d nodes takes d of them
            own = (level - 1) * topk + torch.arange(topk, device=self.device).expand(batch, topk)
            parents = frontier.parents[..., None]
            paths = torch.cat([paths.gather(1, parents.expand(-1, -1, level - 1)), own[..., None]], dim=-1)
            states = states.gather(1, parents.expand(-1, -1, states.shape[-1]))
            metadata = None
            if attend:
                path = PathMetadata(
                    block_table, last[:, 0] + 1, longest, self.scratch_keys, self.scratch_values, paths
                )
                metadata = {self.draft_attn_layer_name: path}
            positions = (last + level).clamp(max=self.max_model_len - 1).repeat(1, topk)
            # No slots: the layer writes nothing to the sequence's cache.
            with set_forward_context(metadata, self.vllm_config, num_tokens=batch * topk, slot_mapping={}):
                normed, states = self.model(
                    # The compiled draft was traced with ids of this type and would read others as such.
                    input_ids=frontier.tokens.flatten().to(self.input_buffers.input_ids.dtype),
                    positions=positions.flatten(),
                    hidden_states=states.flatten(0, 1),
                )
            states = states.view(batch, topk, -1)
            log_probs, ids = self.model.top_children(normed, topk)
            shape = (batch, topk, topk)
            frontier = expansion.grow(log_probs.view(shape), ids.view(shape))
        return expansion.rerank(nodes)

    def _group(self) -> int:
        """KV cache group of the draft's layer."""
        groups = self.kv_cache_config.kv_cache_groups
        return next(i for i, group in enumerate(groups) if self.draft_attn_layer_name in group.layer_names)

    def _path_metadata(self, batch: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Attention metadata and slots of the draft's layers for the rows of the accepted paths."""
        slots = self.block_tables.compute_slot_mappings(
            batch.idx_mapping, batch.query_start_loc, batch.positions, batch.num_tokens
        )
        metadata = build_attn_metadata(
            attn_groups=self.attn_groups,
            num_reqs=batch.num_reqs,
            num_tokens=batch.num_tokens,
            query_start_loc_gpu=batch.query_start_loc,
            query_start_loc_cpu=torch.from_numpy(batch.query_start_loc_np),
            max_query_len=int(batch.num_scheduled_tokens.max()),
            seq_lens=batch.seq_lens,
            max_seq_len=int(batch.seq_lens_cpu_upper_bound.max()),
            block_tables=[table[: batch.num_reqs] for table in self.block_tables.input_block_tables],
            slot_mappings=slots,
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu_upper_bound,
            positions=batch.positions,
            is_prefilling=torch.from_numpy(batch.is_prefilling_np),
        )
        return metadata, build_slot_mappings_by_layer(slots, self.kv_cache_config)


class AcceptedRows(NamedTuple):
    """A batch cut down to what the draft reads."""

    batch: Any  # InputBatch
    rows: torch.Tensor  # int64 [tokens], where its rows come from
    dropped: torch.Tensor  # int32 [batch], rows left out of each request


def accepted_rows(input_batch: Any, step: TreeStep, path: torch.Tensor, max_depth: int) -> AcceptedRows:
    """The batch as if each request had drafted its accepted path as a chain of max_depth tokens.

    A request with drafts keeps its rows up to the root and max_depth rows after it: those of the nodes in
    `path` (int64 `[batch, nodes + 1]`), at the linear positions that follow the root. Others keep all their
    rows. How many are dropped is known on the host, which of them are the path's is not.
    """
    batch = input_batch.num_reqs
    drafts = input_batch.num_draft_tokens_per_req
    dropped_np = np.maximum(drafts - max_depth, 0).astype(np.int32)
    lens_np = input_batch.num_scheduled_tokens[:batch] - dropped_np
    starts_np = np.zeros(batch + 1, dtype=np.int32)
    np.cumsum(lens_np, out=starts_np[1:])
    tokens = int(starts_np[-1])

    device = input_batch.query_start_loc.device
    logits = input_batch.cu_num_logits[: batch + 1].diff().int()
    dropped = (logits - 1 - max_depth).clamp(min=0)
    old_starts = input_batch.query_start_loc[: batch + 1]
    starts = old_starts.clone()
    starts[1:] -= dropped.cumsum(0)
    lens = (starts[1:] - starts[:-1]).long()
    request = torch.repeat_interleave(torch.arange(batch, device=device), lens, output_size=tokens)
    offset = torch.arange(tokens, device=device) - starts[request]
    linear = old_starts[request] + offset  # the dropped rows are a request's last
    node = offset - (lens - (logits - dropped))[request]  # 0 at the root, negative before it
    in_tree = step.rows[request, path[request, node.clamp(min=0)]]
    rows = torch.where(node < 0, linear.long(), in_tree)
    compact = replace(
        input_batch,
        num_tokens=tokens,
        num_tokens_after_padding=tokens,
        num_reqs_after_padding=batch,
        num_scheduled_tokens=lens_np,
        query_start_loc=starts,
        query_start_loc_np=starts_np,
        seq_lens=input_batch.seq_lens[:batch] - dropped,
        seq_lens_cpu_upper_bound=input_batch.seq_lens_cpu_upper_bound[:batch] - torch.from_numpy(dropped_np),
        input_ids=input_batch.input_ids[rows],
        positions=input_batch.positions[linear],
        is_padding=input_batch.is_padding[:tokens],
        decode_graph_eligible=False,
    )
    return AcceptedRows(compact, rows, dropped)
