"""The state that the four phases of a draft tree share: growth, mask, verification and commit use one `TreeState`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_eagle3.kernels import ancestor_bits
from vllm_eagle3.tree.drawn import DrawnTrees
from vllm_eagle3.tree.growth import UNUSED
from vllm_eagle3.tree.mask import TreeMask
from vllm_eagle3.tree.match_rates import MatchRates


class DrawnFrom(NamedTuple):
    """The draft's distributions that nodes were drawn from."""

    q: torch.Tensor  # [requests, expansions, draft_vocab]
    draft_ids: torch.Tensor  # int64 [vocab], id of each token in the draft's vocabulary, -1 for none
    target_ids: torch.Tensor  # int64 [draft_vocab]


@dataclass
class TreeStep:
    """The rows of this step's trees in the batch. Entries after a request's drafts repeat the row of its root."""

    requests: torch.Tensor  # int64 [batch], request-state index
    rows: torch.Tensor  # int64 [batch, nodes + 1], row of each node in the batch
    slot_mappings: torch.Tensor  # int64 [kv_cache_groups, tokens], slots of the linear positions
    has_drafts: bool
    linear: bool = False  # whether every tree is known to be a chain, so that the rows are a sequence


class TreeState:
    """The trees of all requests, on the device, one row per request-state index.

    `TreeModelState` owns it and gives it to the rejection sampler and to the speculator. In the order of a step:

    1. `prepare`, before the target's forward pass, finds the rows of the last step's trees and writes the mask.
    2. `record_path`, in the rejection sampler, keeps the path that the target accepted.
    3. `path_rows`, in the commit and in the speculator, returns the rows of this path.
    4. `record_growth`, in the speculator, keeps the parents of the new tree for the next step.
    """

    def __init__(self, requests: int, nodes: int, tokens: int, device: torch.device) -> None:
        """requests, tokens: the most of a batch. nodes: the most drafts of a request, without the root."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.node_ids = torch.arange(nodes + 1, device=device)
        self.parents = zeros(requests, nodes + 1) + UNUSED  # column 0, the root's, is ignored
        self.depth = zeros(requests, nodes + 1)
        self.path = self.node_ids.repeat(requests, 1)  # node at each depth
        self.linear = torch.ones(requests, dtype=torch.bool, device=device)  # on a CPU: trees that are chains
        self.chain_only = torch.zeros(requests, dtype=torch.bool, device=device)
        self.drawn = torch.zeros(requests, dtype=torch.bool, device=device)  # requests whose nodes are drawn
        self.expanded = zeros(requests, nodes + 1) - 1  # as `tree.drawn.DrawnTrees.expanded`
        self.given = zeros(requests)  # nodes of each graft: the tree's first ones
        self.match = zeros(requests)  # length of the match that each graft was looked up with
        self.rates = MatchRates(requests, device)
        self.graft_counts: tuple[int, int] | None = (
            None  # nodes verified and accepted in the last step, on a CPU
        )
        self.draws: DrawnFrom | None = None  # None: no nodes are drawn
        # The addresses must not change, because a CUDA graph of the target may use them.
        self.mask = TreeMask(root=zeros(tokens), bits=zeros(tokens) + 1, positions=zeros(tokens))
        self.prefix_lens = torch.zeros(
            requests, dtype=torch.int32, device=device
        )  # of the batch's requests, in order
        self.step: TreeStep | None = None

    def add_request(self, request: int, chain_only: bool, drawn: bool) -> None:
        """Clear the row of a new request, because an earlier request may have left a tree in it."""
        self.parents[request] = UNUSED
        self.linear[request] = True
        self.chain_only[request] = chain_only
        self.drawn[request] = drawn and self.draws is not None
        self.given[request] = 0
        self.rates.forget(request)

    def node_rows(self, roots: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of each node [batch, nodes + 1], and whether it is used; an unused node repeats the row of its root.

        roots: int64 [batch, 1], row of each root; the rows of its nodes follow it. counts: int64 [batch, 1], rows
        of each tree, the root included.
        """
        used = self.node_ids < counts
        return torch.where(used, roots + self.node_ids, roots), used

    def prepare(
        self,
        requests: torch.Tensor,
        roots: torch.Tensor,
        counts: torch.Tensor,
        linear_positions: torch.Tensor,
        slot_mappings: torch.Tensor,
        has_drafts: bool,
    ) -> TreeMask:
        """Begin a step: place the trees that `record_growth` kept. Returns the mask of the batch's rows.

        requests: int64 [batch], request-state index. roots, counts: see `node_rows`. linear_positions, slot_mappings:
        int64 [tokens] and [kv_cache_groups, tokens], vLLM's values for the rows, in which each tree is a chain.
        """
        rows, used = self.node_rows(roots, counts)
        # On a GPU this would wait for the device.
        linear = rows.device.type == "cpu" and bool(self.linear[requests].all())
        self.step = TreeStep(requests, rows, slot_mappings, has_drafts, linear)
        depth, bits = ancestor_bits(self.parents[requests])
        self.depth[requests] = depth.long()
        self.path[requests] = self.node_ids
        self.prefix_lens.zero_()
        self.prefix_lens[: len(roots)] = linear_positions[roots[:, 0]].int()
        mask = TreeMask(*(buffer[: len(linear_positions)] for buffer in self.mask))
        mask.fill(linear_positions, rows, used, depth, bits)
        return mask

    def record_path(self, requests: torch.Tensor, path: torch.Tensor) -> None:
        """Keep the accepted paths, int64 [batch, nodes + 1] as from `tree.acceptance.accept`."""
        self.path[requests] = path

    def path_rows(self) -> torch.Tensor:
        """int64 [batch, nodes + 1], row in this step's batch of the accepted path's node at each depth."""
        assert self.step is not None
        return self.step.rows.gather(1, self.path[self.step.requests])

    def record_growth(self, requests: torch.Tensor, parents: torch.Tensor) -> None:
        """Keep new trees: parents int64 [batch, columns], node i + 1 in column i; the missing columns are unused."""
        if parents.device.type == "cpu":
            follows = parents == self.node_ids[: parents.shape[1]]
            self.linear[requests] = (follows | (parents == UNUSED)).all(dim=1)
        missing = self.parents.shape[1] - 1 - parents.shape[1]
        self.parents[requests] = torch.nn.functional.pad(parents, (1, missing), value=UNUSED)

    def record_graft(self, requests: torch.Tensor, given: torch.Tensor, match: torch.Tensor) -> None:
        """Keep how many nodes of new trees are a graft's, and the length of its match, both int64 [batch]."""
        self.given[requests], self.match[requests] = given, match

    def learn_from_grafts(
        self, requests: torch.Tensor, drafted: torch.Tensor, accepted: torch.Tensor
    ) -> None:
        """Take the last verification into the rates: nodes verified and accepted of each request, int64 [batch]."""
        verified, nodes = torch.minimum(self.given[requests], drafted), self.node_ids[1:]
        # The path's node at depth d is d only on a graft, and behind the accepted ones.
        on_graft = self.path[requests, 1:] == nodes
        on_graft &= nodes <= torch.minimum(verified, accepted)[:, None]
        taken = on_graft.sum(dim=1)
        self.rates.observe(requests, self.match[requests], verified, taken, len(nodes))
        if taken.device.type == "cpu":  # a GPU's would be waited for
            self.graft_counts = int(verified.sum()), int(taken.sum())

    def drawn_trees(self, requests: torch.Tensor) -> DrawnTrees:
        """The data that verification needs for the drawn trees of these requests."""
        assert self.draws is not None
        q, draft_ids, target_ids = self.draws
        return DrawnTrees(q[requests], self.expanded[requests], self.given[requests], draft_ids, target_ids)
