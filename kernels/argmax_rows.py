"""The argmax of each row of logits on a CPU, several times faster than `torch.argmax`, which is not vectorised."""

import torch

from vllm_eagle3.kernels._numba import jit

BLOCK = 1024
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def argmax_rows(logits: torch.Tensor) -> torch.Tensor:
    """Index (int64 [n]) of the first largest value of each row of logits [n, vocab] on a CPU.

    The last dimension must be contiguous; rows may have any stride. As in `torch.argmax`, 0.0 equals -0.0, and a NaN
    (of positive sign, as arithmetic produces them) is larger than all numbers.

    Raises:
        TypeError: logits that are neither fp32 nor bf16 nor fp16.
    """
    rows, vocab = logits.shape
    integer = INTEGERS.get(logits.dtype)
    if integer is None:
        raise TypeError(f"argmax_rows: expected logits in fp32, bf16 or fp16, found {logits.dtype}")
    assert logits.stride(1) == 1 or vocab == 1, logits.stride()
    out = torch.empty(rows, dtype=torch.int64)
    if rows:
        stride = logits.stride(0)
        flat = logits.as_strided(((rows - 1) * stride + vocab,), (1,)).view(integer)
        bits = flat.numpy()
        _argmax(bits, stride, vocab, out.numpy(), bits.dtype.type(torch.iinfo(integer).min))
    return out


@jit
def _argmax(flat, stride, vocab, out, lowest):
    """The argmax of floats whose bits are given as integers. `lowest` is the smallest integer of their type.

    If all bits but the sign of negative numbers are flipped, these integers have the same order as the floats, and
    the compiler uses vector instructions for their maximum. This finds the block with the maximum first, and then the
    maximum's place in it.
    """
    integer = flat.dtype.type
    for i in range(out.shape[0]):
        best, place = lowest, 0
        for begin in range(0, vocab, BLOCK):
            block = flat[i * stride + begin : i * stride + min(begin + BLOCK, vocab)]
            largest = lowest
            for j in range(block.shape[0]):
                largest = max(largest, integer(block[j] if block[j] >= 0 else block[j] ^ ~lowest))
            if largest > best:
                best, place = largest, begin
        bits = integer(best if best >= 0 else best ^ ~lowest)
        for j in range(place, vocab):
            x = flat[i * stride + j]
            if x == bits or (bits == 0 and x == lowest):
                out[i] = j
                break
