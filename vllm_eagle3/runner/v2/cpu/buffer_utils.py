"""CPU forms of the kernels of vllm.v1.worker.gpu.buffer_utils."""

from typing import Any

import numpy as np
import torch

from vllm_eagle3.kernels._numba import int32_array, jit

UPSTREAM = "vllm.v1.worker.gpu.buffer_utils"


def _apply_write_kernel(
    output_ptr: torch.Tensor,
    output_stride: Any,
    write_indices_ptr: torch.Tensor,
    write_starts_ptr: torch.Tensor,
    write_contents_ptr: torch.Tensor,
    write_cu_lens_ptr: torch.Tensor,
    write_group_ids_ptr: torch.Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Copy each staged run of values into its row of the output, or of its group's output."""
    writes = (
        write_indices_ptr.numpy(),
        write_starts_ptr.numpy(),
        write_contents_ptr.numpy(),
        write_cu_lens_ptr.numpy(),
    )
    if MULTI_GROUP:
        assert write_group_ids_ptr is not None
        _write_groups(output_ptr.numpy(), output_stride.numpy(), *writes, write_group_ids_ptr.numpy())
    else:
        _write(output_ptr.view(len(output_ptr), -1).numpy(), *writes)


@jit
def _write(out, indices, starts, contents, ends):
    first = 0
    for i in range(indices.shape[0]):
        for j in range(first, ends[i]):
            out[indices[i], starts[i] + j - first] = contents[j]
        first = ends[i]


@jit
def _write_groups(addresses, strides, indices, starts, contents, ends, groups):
    first = 0
    for i in range(indices.shape[0]):
        group = groups[i]
        begin = np.int64(indices[i]) * strides[group] + starts[i]
        out = int32_array(addresses[group], begin + ends[i] - first)
        for j in range(first, ends[i]):
            out[begin + j - first] = contents[j]
        first = ends[i]
