"""Reduces a verified batch to the rows of its accepted paths."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch


class AcceptedRows(NamedTuple):
    """A batch with only the rows that the draft reads."""

    batch: Any  # InputBatch
    rows: torch.Tensor  # int64 [tokens], index of each row in the verified batch
    dropped: torch.Tensor  # int32 [batch], rows left out of each request


def accepted_rows(input_batch: Any, path_rows: torch.Tensor, max_depth: int) -> AcceptedRows:
    """The batch as if each request had drafted its accepted path as a chain of max_depth tokens.

    A request with drafts keeps its rows up to the root and max_depth rows after it. Those rows are the nodes of
    `path_rows` (int64 `[batch, nodes + 1]`, row of the accepted path's node at each depth), at the linear positions
    after the root. A request without drafts keeps all its rows. The host knows how many rows are dropped, but only the
    device knows the rows of the path.
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
    linear = old_starts[request] + offset  # the last rows of a request are dropped
    node = offset - (lens - (logits - dropped))[request]  # 0 at the root, negative before it
    in_tree = path_rows[request, node.clamp(min=0)]
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
