"""The random numbers of Triton's `tl.rand`, which upstream's verification uses."""

import numpy as np

from vllm_eagle3.kernels._numba import jit

SMALLEST = np.float32(4.6566127342e-10)  # upstream's _TL_RAND_MIN: the smallest positive value of tl.rand


@jit
def uniform(seed, offset):
    """`max(tl.rand(seed, offset), SMALLEST)` for int64 seed and offset: Philox 4x32 with 10 rounds."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1 = np.uint64(offset) & low, (np.uint64(offset) >> np.uint64(32)) & low
    c2, c3 = np.uint64(0), np.uint64(0)
    k0, k1 = np.uint64(seed) & low, (np.uint64(seed) >> np.uint64(32)) & low
    for _ in range(10):
        b, a = np.uint64(0xCD9E8D57) * c2, np.uint64(0xD2511F53) * c0
        c0, c2 = (b >> np.uint64(32)) ^ c1 ^ k0, (a >> np.uint64(32)) ^ c3 ^ k1
        c1, c3 = b & low, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    bits = np.int64(c0)
    if bits >= 1 << 31:  # as int32; negative x becomes -x - 1
        bits = (1 << 32) - bits - 1
    return max(np.float32(bits) * SMALLEST, SMALLEST)
