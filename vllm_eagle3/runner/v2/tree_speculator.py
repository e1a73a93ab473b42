"""The speculator that grows draft trees in Model Runner V2; `tree_rejection_sampler` verifies them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.kernels import MOST_LOGITS, TreeGrowth, cpu
from vllm_eagle3.runner.policy_install import largest_tree, tree_shapes
from vllm_eagle3.runner.v2.accepted_rows import accepted_rows
from vllm_eagle3.runner.v2.grafts import Found, Grafts
from vllm_eagle3.runner.v2.speculator import Eagle3Speculator
from vllm_eagle3.runner.v2.tree_attention import PathMetadata
from vllm_eagle3.runner.v2.tree_draws import TreeDraws
from vllm_eagle3.runner.v2.tree_limits import USE_A_CHAIN
from vllm_eagle3.runner.v2.tree_model_state import TreeModelState
from vllm_eagle3.runner.v2.tree_state import TreeState
from vllm_eagle3.tree.growth import Growth


class TreeSpeculator(Eagle3Speculator):
    """Grows a tree for each request from the target's states along the accepted path.

    The first draft step is a chain's, over the accepted path only. From its last row the tree grows level by level,
    each with one pass of the draft's layer over the expanded nodes of all requests, whose KV is in scratch memory.
    """

    model: Any  # the draft, vllm_eagle3.model.draft

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, options: Eagle3Options, req_states: Any
    ) -> None:
        """req_states: the runner's RequestState, which has the texts for grafts."""
        super().__init__(vllm_config, device)
        assert options.tree is not None
        self.tree = tree = options.tree
        self.deepest = options.deepest
        self.grafts = Grafts(options.grafts, req_states) if options.grafts else None
        self.shapes = tree_shapes(vllm_config, options)
        self.largest = self.shape = largest_tree(self.num_speculative_steps, options)
        self.root_children = (  # written by the first draft step: log-probabilities and ids
            torch.zeros(self.max_num_reqs, tree.topk, device=device),
            torch.zeros(self.max_num_reqs, tree.topk, dtype=torch.int64, device=device),
        )
        self.chain = torch.zeros(self.max_num_reqs, dtype=torch.bool, device=device)  # who gets a chain
        self.parents = torch.zeros(self.max_num_reqs, tree.nodes, dtype=torch.int64, device=device)
        self.values = torch.zeros(self.max_num_reqs, tree.nodes, device=device)  # as tree.growth.Tree.values
        in_triton = device.type == "cuda" and options.fused_kernels
        self.growth: type[Growth | cpu.Growth | TreeGrowth] = TreeGrowth if in_triton else Growth
        self.draws: TreeDraws | None = None  # made by set_attn
        self.growth_graphs: CudaGraphManager | None = None
        self.tree_state: TreeState | None = None  # handed in by set_attn, after memory has been profiled

    def load_model(self, target_model: torch.nn.Module) -> None:
        stock = resolve_model_state_cls(self.vllm_config, target_model)
        if stock is not DefaultModelState:
            raise ValueError(
                f"draft trees do not support targets whose model state is {stock.__name__}; {USE_A_CHAIN}"
            )
        # vLLM asks the target for this hook. It is set on the instance.
        target_model.get_model_state_cls = lambda: TreeModelState  # type: ignore[assignment]
        super().load_model(target_model)
        # Requests whose trees grow together: a level's rows must fit the compiled draft, and their logits the memory.
        rows = min(self.max_num_tokens, MOST_LOGITS // self.model.draft_config.draft_vocab_size)
        self.group = max(rows // self.tree.topk, 1)
        (self.draft_attn_layer_name,) = self.draft_attn_layer_names
        layer = self.vllm_config.compilation_config.static_forward_context[self.draft_attn_layer_name]
        slots = (self.tree.depth - 1) * self.tree.topk
        shape = (self.max_num_reqs, slots, layer.num_kv_heads, layer.head_size)
        self.scratch_keys = torch.zeros(shape, dtype=self.dtype, device=self.device)  # type: ignore[arg-type]
        self.scratch_values = torch.zeros_like(self.scratch_keys)

    def set_attn(self, model_state: Any, *args: Any, **kwargs: Any) -> None:
        super().set_attn(model_state, *args, **kwargs)
        assert isinstance(model_state, TreeModelState)
        self.tree_state = model_state.tree_state
        self.draws = self.make_draws(self.tree_state)

    def make_draws(self, tree_state: TreeState) -> TreeDraws | None:
        """The object that draws nodes for requests that sample; None if all requests take the likeliest."""
        return None

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepare CUDA graphs of the growth: one graph contains all levels for one batch size.

        The first draft step runs eagerly, because upstream captures other rows.
        """
        super().init_cudagraph_manager(CUDAGraphMode.NONE)
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        config = copy.copy(self.vllm_config)
        config.compilation_config = copy.copy(config.compilation_config)
        config.compilation_config.cudagraph_capture_sizes = self._graph_sizes()
        self.growth_graphs = CudaGraphManager(
            config,
            self.device,
            CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE,
            decode_query_len=1,
        )

    def _graph_sizes(self) -> list[int]:
        """Requests per graph: powers of two, as long as a level's rows fit in vLLM's largest graph."""
        largest = (self.vllm_config.compilation_config.max_cudagraph_capture_size or 0) // self.tree.topk
        largest = min(largest, self.group, self.max_num_reqs)
        return sorted({largest, *(1 << i for i in range(largest.bit_length()))} - {0})

    def capture(self) -> None:
        """Capture the graphs that init_cudagraph_manager prepared."""
        assert self.growth_graphs is not None

        def growth(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            assert desc.num_reqs is not None
            requests = slice(0, desc.num_reqs)
            self.block_tables.get_dummy_block_tables(desc.num_reqs)
            self.input_buffers.positions[requests].zero_()
            return lambda _: self._grow_rows(requests, self.tree.nodes, attend=True)

        self.growth_graphs.capture(growth, progress_bar_desc="Capturing CUDA graphs of the draft tree")

    # Long: a quarter is vLLM's signature, the rest is one proposal in the order of its steps.
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
        """Draft ids [num_reqs, num_speculative_tokens], as upstream's; their parents go to the tree state.

        If the policy chooses the number of drafts, num_speculative_tokens is the number of nodes of a shape in its
        menu. Otherwise the tree is cut to this number of its best nodes.
        """
        budget = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        self.shape = self.shapes.get(budget, self.largest)
        trees = None if dummy_run else self.tree_state
        if trees is not None and trees.step is not None and trees.step.has_drafts and not trees.step.linear:
            path = accepted_rows(input_batch, trees.path_rows(), self.deepest)
            attn_metadata, slot_mappings = self._path_metadata(path.batch)
            input_batch = path.batch
            last_hidden_states = last_hidden_states[path.rows]
            aux_hidden_states = aux_hidden_states and [states[path.rows] for states in aux_hidden_states]
            num_rejected = (num_rejected - path.dropped).clamp(min=0)
        batch, requests = input_batch.num_reqs, input_batch.idx_mapping
        found = None
        if trees is not None and self.grafts is not None:
            self.grafts.learn(input_batch, trees, num_sampled[:batch])
            found = self.grafts.look_up(input_batch, trees) if budget else None
        drafting = budget > 0 and (found is None or self.drafts_beside(found, num_sampled[:batch] > 0))
        if self.draws is not None:
            self.draws.begin(requests[:0] if trees is None else requests, self.shape.width)
        first = super().propose(
            input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
            num_rejected, *args, dummy_run=dummy_run, num_speculative_tokens=self.first_drafts() if drafting else 0,
            **kwargs,
        )  # fmt: skip
        if budget == 0:
            return first
        self.chain[:batch] = False if trees is None else trees.chain_only[requests]
        nodes = min(budget, self.tree.nodes) if drafting else 0
        if drafting:
            self._grow(input_batch, nodes, attend=attn_metadata is not None)
        drafts = self.draft_tokens[:batch]
        tokens = drafts[:, :nodes] if trees is None else self._keep(trees, requests, nodes, budget, found)
        drafts[:, : tokens.shape[1]] = tokens
        drafts[:, tokens.shape[1] :] = 0
        if trees is not None:
            self.mark_unused(drafts, requests)
        return drafts

    def first_drafts(self) -> int:
        """How many drafts are made as a chain before trees grow from the first draft step."""
        return 1

    def drafts_beside(self, found: Found, decoding: torch.Tensor) -> bool:
        """Whether trees grow beside what was found. decoding: bool [batch], requests whose drafts are verified."""
        return True  # a GPU decides nothing by values that the host would have to wait for

    def _keep(
        self, trees: TreeState, requests: torch.Tensor, nodes: int, places: int, found: Found | None
    ) -> torch.Tensor:
        """Merge grafts into the trees that have grown `nodes` nodes, and record them. Returns their tokens."""
        batch = len(requests)
        tokens, parents = self.draft_tokens[:batch, :nodes], self.parents[:batch, :nodes]
        added = parents.new_zeros(batch)
        number = torch.arange(nodes + 1, device=self.device).expand(batch, -1)
        if found is not None and self.grafts is not None:
            tokens, parents, added, number = self.grafts.merge(
                found, tokens, parents, self.values[:batch, :nodes], places, self.chain[:batch]
            )
            trees.record_graft(requests, added, found.match)
        trees.record_growth(requests, parents)
        if self.draws is not None and self.draws.active:
            self.draws.record(number, added)
        return tokens

    def mark_unused(self, drafts: torch.Tensor, requests: torch.Tensor) -> None:
        """Does nothing here: unused nodes have token 0, because the scheduler expects a draft in every place."""

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep the root's children. The first draft step calls this with the last row of each request."""
        log_probs, ids = self._children(hidden_states, slice(0, len(hidden_states)), 0)
        self.root_children[0][: len(ids), : self.shape.width] = log_probs
        self.root_children[1][: len(ids), : self.shape.width] = ids
        return ids[:, 0]

    def _children(
        self, hidden_states: torch.Tensor, at: slice, level: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and target ids of the children of a level's n nodes, [n, width], of the requests `at`."""
        if self.draws is not None and self.draws.active:
            return self.draws.children(hidden_states, self.temperature, at, level)
        return self.model.top_children(hidden_states, self.shape.width)

    def _grow(self, input_batch: Any, nodes: int, attend: bool) -> None:
        """Write at least `nodes` nodes of each request's tree to draft_tokens and parents.

        attend: False only while memory is profiled, when there is no KV cache.
        """
        batch = input_batch.num_reqs
        if attend:
            assert self.growth_graphs is not None
            graph = self.growth_graphs.dispatch(batch, batch, uniform_token_count=1, num_active_loras=0)
            if graph.cg_mode == CUDAGraphMode.FULL:
                self.growth_graphs.run_fullgraph(graph)
                return
        for first in range(0, batch, self.group):
            self._grow_rows(slice(first, min(first + self.group, batch)), nodes, attend)

    def _grow_rows(self, at: slice, nodes: int, attend: bool) -> None:
        """Grow the trees of the requests `at`. Uses only buffers and no values on the host, as CUDA graphs require."""
        depth, topk = self.shape.depth, self.shape.width
        last = self.input_buffers.positions[at]  # position of the row from which the tree grows
        # The compiled draft was traced with ids of this dtype, and reads ids of another dtype wrongly.
        id_dtype = self.input_buffers.input_ids.dtype
        grow = self.draws.growth(at) if self.draws is not None and self.draws.active else self.growth
        growth = grow(depth, topk, self.chain[at], last, self.max_model_len - 1, id_dtype)
        log_probs, ids = (children[at, :topk] for children in self.root_children)
        level = growth.extend(log_probs, ids, self.hidden_states[at])
        prefix = None
        if attend:
            block_table = self.block_tables.input_block_tables[self._group()][at]
            prefix = (block_table, last + 1, self.scratch_keys[at], self.scratch_values[at])
        for number in range(1, min(depth, nodes)):  # a path of d nodes takes d of them
            normed, states = self.draft_level(level, PathMetadata(*prefix, level.paths) if prefix else None)
            log_probs, ids = self._children(normed, at, number)
            level = growth.extend(log_probs, ids, states)
        self.values[at, :nodes] = growth.rerank(self.draft_tokens[at, :nodes], self.parents[at, :nodes])

    def draft_level(
        self, level: cpu.Level, metadata: PathMetadata | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the draft over the nodes of a level: norm(a) and the children's g, both [batch * topk, hidden]."""
        attention = metadata and {self.draft_attn_layer_name: metadata}
        # Without slots the layer writes nothing to the sequence's cache.
        with set_forward_context(attention, self.vllm_config, num_tokens=len(level.tokens), slot_mapping={}):
            return self.model(input_ids=level.tokens, positions=level.positions, hidden_states=level.states)

    def _group(self) -> int:
        """KV cache group of the draft's layer."""
        groups = self.kv_cache_config.kv_cache_groups
        return next(i for i, group in enumerate(groups) if self.draft_attn_layer_name in group.layer_names)

    def _path_metadata(self, batch: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Attention metadata and slots of the draft's layers, for the rows of the accepted paths."""
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
