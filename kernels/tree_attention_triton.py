"""The Triton kernel of `tree_attention`, which describes what it computes."""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit
def _find_block(starts_ptr, requests, index, BLOCK_Q: tl.constexpr):
    """The request of the `index`-th block of rows, and the number of this block among the request's blocks.

    The blocks of request r begin at index starts[r] // BLOCK_Q + r, which leaves room for all blocks before them. So
    the grid is hardly larger than the number of blocks, even if one request is much longer than the others.
    """
    low = 0
    high = requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= index:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    return request, index - (tl.load(starts_ptr + request) // BLOCK_Q + request)


@triton.jit
def _attend_tile(
    q, key, key_ok,
    best, total, acc,
    kv_ptr, kv_block_stride, kv_slot_stride,
    table_ptr,
    root, bits, position,
    factor, softcap, window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax, over the keys at positions `key`; scores are base-2 logarithms."""
    d = tl.arange(0, BLOCK_D)
    if MASKED:
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key_ok, other=0)
        kv_mask = key_ok[:, None] & (d < HEAD_DIM)[None, :]
    else:
        block = tl.load(table_ptr + key // BLOCK_SIZE)
        kv_mask = (d < HEAD_DIM)[None, :]
    slot = block.to(tl.int64) * kv_block_stride + (key % BLOCK_SIZE) * kv_slot_stride
    k = tl.load(kv_ptr + slot[:, None] + d[None, :], mask=kv_mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if HAS_SOFTCAP:  # `factor` is scale / softcap; this form of tanh cannot overflow
        ratio = tl.exp2(-2.885390081777927 * tl.abs(scores))
        scores = (
            tl.where(scores < 0, -1.0, 1.0) * (softcap * 1.4426950408889634) * (1.0 - ratio) / (1.0 + ratio)
        )
    if MASKED:
        node = key[None, :] - root[:, None]
        in_prefix = node < 0
        if HAS_WINDOW:
            in_prefix = in_prefix & (key[None, :] > position[:, None] - window)
        shift = tl.minimum(tl.maximum(node, 0), 62).to(tl.int64)
        in_tree = (node >= 0) & (node < 63) & (((bits[:, None] >> shift) & 1) == 1)
        scores = tl.where((in_prefix | in_tree) & key_ok[None, :], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    safe = new_best
    if MASKED:  # a row may not have seen any key so far
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - safe[:, None])
    decay = tl.exp2(best - safe)
    v = tl.load(kv_ptr + slot[:, None] + HEAD_DIM + d[None, :], mask=kv_mask, other=0.0)
    acc = acc * decay[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
    return new_best, total * decay + tl.sum(weights, 1), acc


# Long: a third is the signature, and the steps of one program share too many values to be functions of their own.
@triton.jit(do_not_specialize=["requests", "lse_stride"])  # or some batches would compile while they wait
def tree_attention_kernel(
    out_ptr, out_stride,
    lse_ptr, lse_stride,
    part_ptr, part_max_ptr, part_sum_ptr,
    q_ptr, q_stride,
    kv_ptr, kv_block_stride, kv_head_stride, kv_slot_stride,
    table_ptr, table_stride,
    starts_ptr, lens_ptr,
    root_ptr, bits_ptr, positions_ptr,
    sinks_ptr,
    requests, heads, scale, softcap, window,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NODES_ONLY: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q rows of a request x the heads of one KV head, over one share of the keys."""
    request, block = _find_block(starts_ptr, requests, tl.program_id(0), BLOCK_Q)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(starts_ptr + request)
    rows = tl.load(starts_ptr + request + 1) - start
    if block * BLOCK_Q >= rows:
        return

    m = tl.arange(0, BLOCK_M)
    row = block * BLOCK_Q + m // GROUP
    row_ok = (m // GROUP < BLOCK_Q) & (row < rows)
    token = (start + row).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    row_mask = row_ok[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + (token * q_stride + head * HEAD_DIM)[:, None] + d[None, :], mask=row_mask, other=0.0)
    bits = tl.load(bits_ptr + token, mask=row_ok, other=1)
    root = tl.load(root_ptr + token, mask=row_ok, other=0).to(tl.int32)
    position = tl.load(positions_ptr + token, mask=row_ok, other=0).to(tl.int32)

    # These rows see no keys outside `first` to `last`. Every row sees all keys before `whole`.
    last = tl.max(tl.where(row_ok, root + tl.where(bits == 1, 1, 63), 0), 0)
    last = tl.minimum(last, tl.load(lens_ptr + request)).to(tl.int32)
    whole = tl.min(tl.where(row_ok, root, 1 << 30), 0)
    first = 0
    if NODES_ONLY:
        first = whole
    if HAS_WINDOW:
        first = tl.maximum(first, tl.min(tl.where(row_ok, position, 1 << 30), 0) - window + 1)
        whole = 0  # the rows' windows begin at different keys
    share = tl.maximum(tl.cdiv(tl.cdiv(last - first, TILE), SPLITS), LEAST_TILES) * TILE
    low = first + split * share
    high = tl.minimum(low + share, last)
    part = (token * heads + head) * SPLITS + split
    if low >= high:
        if SPLITS > 1:
            tl.store(part_max_ptr + part, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=row_ok)
        return

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SINKS:
        counted = row_ok & (split == 0)  # the sink is one more logit, in the first share
        best = (
            tl.load(sinks_ptr + head, mask=counted, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        )
        total = tl.where(counted, 1.0, 0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = scale * 1.4426950408889634
    if HAS_SOFTCAP:
        factor = scale / softcap
    kv_ptr += kv_head.to(tl.int64) * kv_head_stride
    table_ptr += request.to(tl.int64) * table_stride
    n = tl.arange(0, TILE)
    middle = low + tl.maximum(tl.minimum(high, whole) - low, 0) // TILE * TILE
    if not (NODES_ONLY or HAS_WINDOW):  # in these cases no key is visible to all rows
        for begin in range(low, middle, TILE):
            best, total, acc = _attend_tile(
                q, begin + n, None, best, total, acc, kv_ptr, kv_block_stride, kv_slot_stride, table_ptr,
                root, bits, position, factor, softcap, window, HEAD_DIM, BLOCK_D, BLOCK_SIZE, False, HAS_WINDOW,
                HAS_SOFTCAP,
            )  # fmt: skip
    for begin in range(middle, high, TILE):
        best, total, acc = _attend_tile(
            q, begin + n, begin + n < high, best, total, acc, kv_ptr, kv_block_stride, kv_slot_stride, table_ptr,
            root, bits, position, factor, softcap, window, HEAD_DIM, BLOCK_D, BLOCK_SIZE, True, HAS_WINDOW,
            HAS_SOFTCAP,
        )  # fmt: skip

    if SPLITS == 1:
        out = token * out_stride + head * HEAD_DIM
        tl.store(out_ptr + out[:, None] + d[None, :], acc / total[:, None], mask=row_mask)
        if NODES_ONLY:
            tl.store(
                lse_ptr + head * lse_stride + token, (best + tl.log2(total)) * 0.6931471805599453, mask=row_ok
            )
    else:
        tl.store(part_ptr + part[:, None] * HEAD_DIM + d[None, :], acc, mask=row_mask)
        tl.store(part_max_ptr + part, best, mask=row_ok)
        tl.store(part_sum_ptr + part, total, mask=row_ok)
