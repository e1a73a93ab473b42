"""CPU forms of the kernels of vllm.v1.worker.gpu.block_table."""

import numpy as np
import torch

from vllm_eagle3.kernels._numba import int32_array, jit

UPSTREAM = "vllm.v1.worker.gpu.block_table"


def _gather_block_tables_kernel(
    batch_idx_to_req_idx: torch.Tensor,
    src_block_table_ptrs: torch.Tensor,
    dst_block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    num_blocks_ptr: torch.Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Copy the block ids of the batch's requests, group by group.

    Upstream also writes zeros to the rows that pad a batch for a CUDA graph. On a CPU no batch is padded.
    """
    _gather(
        batch_idx_to_req_idx[:num_reqs].numpy(),
        src_block_table_ptrs.numpy(),
        dst_block_table_ptrs.numpy(),
        block_table_strides.numpy(),
        num_blocks_ptr.numpy(),
    )


@jit
def _gather(requests, sources, targets, strides, num_blocks):
    for group in range(sources.shape[0]):
        stride = strides[group]
        target = int32_array(targets[group], requests.shape[0] * stride)
        for i in range(requests.shape[0]):
            begin = np.int64(requests[i]) * stride
            count = num_blocks[group, requests[i]]
            source = int32_array(sources[group], begin + count)
            for j in range(count):
                target[i * stride + j] = source[begin + j]


def _compute_slot_mappings_kernel(
    max_num_tokens: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    pos: torch.Tensor,
    block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    slot_mapping_enabled: torch.Tensor,
    dcp_sharded: torch.Tensor,
    slot_mappings_ptr: torch.Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Write the KV slot of each token, group by group; PAD_ID for dummy requests and after the last token."""
    assert CP_SIZE == 1, "context parallelism does not run on a CPU"
    _slots(
        idx_mapping.numpy(),
        query_start_loc.numpy(),
        pos.numpy(),
        block_table_ptrs.numpy(),
        block_table_strides.numpy(),
        block_sizes.numpy(),
        slot_mapping_enabled.numpy(),
        slot_mappings_ptr.numpy(),
        PAD_ID,
    )


@jit
def _slots(requests, starts, positions, tables, strides, sizes, enabled, slots, pad):
    batch = requests.shape[0]
    for group in range(tables.shape[0]):
        size = np.int64(sizes[group])
        for i in range(batch):
            first, last = starts[i], starts[i + 1]
            if first == last:
                continue
            if requests[i] < 0 or not enabled[group]:
                slots[group, first:last] = pad
                continue
            begin = np.int64(requests[i]) * strides[group]
            table = int32_array(tables[group], begin + strides[group])
            for token in range(first, last):
                position = positions[token]
                slots[group, token] = table[begin + position // size] * size + position % size
        slots[group, starts[batch] :] = pad
