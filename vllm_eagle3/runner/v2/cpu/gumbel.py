"""CPU forms of the kernels of vllm.v1.worker.gpu.sample.gumbel."""

import numpy as np
import torch

from vllm_eagle3.kernels._numba import jit
from vllm_eagle3.runner.v2.cpu.rows import NEG_INF, best, write

UPSTREAM = "vllm.v1.worker.gpu.sample.gumbel"
DRAFT_NOISE_SALT = 1 << 30  # upstream's _DRAFT_NOISE_SALT
TINY32, TINY64 = np.float32(5.960464477539063e-08), 1.1102230246251565e-16


def _temperature_kernel(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    temperature_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Divide each row by its request's temperature. Greedy rows do not change."""
    temperature = temperature_ptr[expanded_idx_mapping_ptr].float()
    logits_ptr /= torch.where(temperature == 0, 1.0, temperature)[:, None]


def _gumbel_sample_kernel(
    local_argmax_ptr: torch.Tensor,
    local_argmax_stride: int,
    local_max_ptr: torch.Tensor,
    local_max_stride: int,
    logits_cache_ptr: torch.Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: torch.Tensor | None,
    logits_cache_source_ptr: torch.Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    seeds_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    """Write each row's largest logit and its token, with Gumbel noise if the request samples.

    Rows of no request (index -1) are greedy. The logits of drafts are also written to the cache for verification.
    """
    requests = expanded_idx_mapping_ptr
    real = requests >= 0
    if logits_cache_ptr is not None:
        assert logits_cache_col_ptr is not None and logits_cache_source_ptr is not None
        columns = (logits_cache_col_ptr if PER_TOKEN_COL else logits_cache_col_ptr.expand(len(requests)))[
            real
        ]
        logits_cache_ptr[requests[real], columns.long(), :vocab_size] = logits_cache_source_ptr[
            real, :vocab_size
        ]
    value, index = best(logits_ptr)
    write(local_max_ptr, value, NEG_INF)
    write(local_argmax_ptr, index, 0)
    temperatures = torch.where(real, temp_ptr[requests.clamp(min=0)].float(), 0.0)
    for row in temperatures.nonzero().flatten().tolist():
        logits = logits_ptr[row].float().numpy()
        if APPLY_TEMPERATURE:
            logits = logits / np.float32(temperatures[row])
        position = int(pos_ptr[row]) + (DRAFT_NOISE_SALT if IS_DRAFTING else 0)
        token, noised = noised_argmax(logits, int(seeds_ptr[requests[row]]), position, USE_FP64)
        local_argmax_ptr[row, 0], local_max_ptr[row, 0] = token, noised


def noised_argmax(logits: np.ndarray, seed: int, position: int, fp64: bool) -> tuple[int, float]:
    """(argmax, max) of logits [vocab] with the Gumbel noise of (seed, position, token).

    NumPy computes the logarithms, because Numba's are not vectorised.
    """
    if fp64:
        uniform = np.empty(len(logits), np.float64)
        _uniform64(seed, position, uniform)
        noise = -np.log(-np.log(uniform))
    else:
        uniform = np.empty(len(logits), np.float32)
        _uniform32(seed, position, uniform)
        direct = np.log(np.maximum(np.float32(1.0) - uniform, TINY32))
        _series_below_a_quarter(uniform, direct)
        noise = -np.log(-direct)
    noise += logits
    index = int(noise.argmax())
    return index, float(noise[index])


@jit
def _mix(h, key):
    """One round of MurmurHash3 with 32 bits."""
    key = np.uint32(key * np.uint32(0xCC9E2D51))
    key = np.uint32((key << np.uint32(15)) | (key >> np.uint32(17)))
    h = np.uint32(h ^ np.uint32(key * np.uint32(0x1B873593)))
    h = np.uint32((h << np.uint32(13)) | (h >> np.uint32(19)))
    return np.uint32(h * np.uint32(5) + np.uint32(0xE6546B64))


@jit
def _finish(h):
    h = np.uint32(h ^ np.uint32(16))
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))


@jit
def _prefix(seed, position, domain):
    h = _mix(np.uint32(domain), np.uint32(seed & 0xFFFFFFFF))
    h = _mix(h, np.uint32((seed >> 32) & 0xFFFFFFFF))
    return _mix(h, np.uint32(position & 0xFFFFFFFF))


@jit
def _uniform32(seed, position, out):
    prefix = _prefix(seed, position, 0)
    for token in range(out.shape[0]):
        h = _finish(_mix(prefix, np.uint32(token)))
        high, low = np.float32(np.int32(h >> np.uint32(16))), np.float32(np.int32(h & np.uint32(0xFFFF)))
        out[token] = high * np.float32(1.52587890625e-05) + (low + np.float32(0.5)) * np.float32(2.0**-32)


@jit
def _uniform64(seed, position, out):
    low_prefix, high_prefix = _prefix(seed, position, 0), _prefix(seed, position, 0x9E3779B9)
    for token in range(out.shape[0]):
        low = np.uint64(_finish(_mix(low_prefix, np.uint32(token))))
        high = np.uint64(_finish(_mix(high_prefix, np.uint32(token))))
        uniform = (np.float64(((high << np.uint64(32)) | low) >> np.uint64(11)) + 0.5) * TINY64
        out[token] = uniform - TINY64 if uniform == 1.0 else uniform


@jit
def _series_below_a_quarter(value, out):
    """If value < 0.25, write log(1 - value) to out, by upstream's series of degree 8 in fp32."""
    for i in range(value.shape[0]):
        v = value[i]
        polynomial = np.float32(1.0 / 8.0)
        polynomial = np.float32(1.0 / 7.0) + v * polynomial
        polynomial = np.float32(1.0 / 6.0) + v * polynomial
        polynomial = np.float32(1.0 / 5.0) + v * polynomial
        polynomial = np.float32(1.0 / 4.0) + v * polynomial
        polynomial = np.float32(1.0 / 3.0) + v * polynomial
        polynomial = np.float32(1.0 / 2.0) + v * polynomial
        polynomial = np.float32(1.0) + v * polynomial
        if v < np.float32(0.25):
            out[i] = -v * polynomial
