"""How often the attention kernels read keys from memory: the order of their programs through a simulated L2 cache. 5 s.

Row blocks that share keys must run at about the same time, so that one reads them from memory and the others from the
cache. An H100 runs about 264 programs at a time (two an SM) and has 50 MB of L2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch

from vllm_eagle3.kernels import node_attention, path_attention, tree_attention

AT_A_TIME, L2_BYTES = 264, 50 << 20
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TILE = 64  # keys
TILE_BYTES = TILE * 2 * HEAD_DIM * 2
Tile = tuple[int, int, int]  # request, KV head, tile


class Grid:
    """Stands in for a kernel, and keeps the grid and the constants that it is launched with."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        self.grid = grid

        def launch(*args: object, **constants: Any) -> None:
            self.constants = constants

        return launch


def misses(programs: Iterator[list[Tile]]) -> int:
    """Tiles read from memory, if programs run in their order, AT_A_TIME at once and each at the same pace."""
    cache: OrderedDict[Tile, None] = OrderedDict()
    missed = 0
    running: list[Iterator[Tile]] = []
    waiting = iter(programs)
    while True:
        while len(running) < AT_A_TIME and (tiles := next(waiting, None)) is not None:
            running.append(iter(tiles))
        if not running:
            return missed
        for program in list(running):
            tile = next(program, None)
            if tile is None:
                running.remove(program)
                continue
            if tile in cache:
                cache.move_to_end(tile)
                continue
            missed += 1
            cache[tile] = None
            if len(cache) > L2_BYTES // TILE_BYTES:
                cache.popitem(last=False)


def launched(monkeypatch: pytest.MonkeyPatch, function: Any, name: str, *args: Any, **kwargs: Any) -> Grid:
    grid = Grid()
    monkeypatch.setitem(function.__globals__, name, grid)
    for other in ("merge_splits",):
        if other in function.__globals__:
            monkeypatch.setitem(function.__globals__, other, lambda *_: None)
    function(*args, **kwargs)
    return grid


def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("rows_together", [True, False])
def test_row_blocks_of_a_tree_share_what_one_reads(monkeypatch, rows_together):
    """rows_together False is the order of an earlier version: requests first, then row blocks."""
    requests, rows, context = 64, 61, 4096
    tokens = requests * rows
    grid = launched(
        monkeypatch, tree_attention.__globals__["_launch"], "tree_attention_kernel",
        of(tokens, HEADS, HEAD_DIM), None, of(tokens, HEADS, HEAD_DIM), of(999, KV_HEADS, 16, 2 * HEAD_DIM),
        of(requests, 512, dtype=torch.int32), of(requests + 1, dtype=torch.int32), of(requests, dtype=torch.int32),
        *[of(tokens, dtype=torch.int64)] * 3, rows, 0.1, 0, 0.0, None, None,
    )  # fmt: skip
    block_q, splits = grid.constants["BLOCK_Q"], grid.constants["SPLITS"]
    assert grid.constants["TILE"] == TILE and grid.grid[1:] == (KV_HEADS, splits)
    tiles = context // TILE
    blocks = list(blocks_of(grid.grid[0], requests, rows, block_q))
    assert len(blocks) == requests * -(-rows // block_q), "every block has a program"
    if not rows_together:
        blocks.sort(key=lambda found: (found[1], found[0]))

    def programs() -> Iterator[list[Tile]]:
        for split, head, (request, _) in product(range(splits), range(KV_HEADS), blocks):
            share = -(-tiles // splits)
            yield [(request, head, t) for t in range(split * share, min((split + 1) * share, tiles))]

    read = misses(programs()) / (requests * KV_HEADS * tiles)
    assert (read <= 1.05) == rows_together, read


def blocks_of(programs: int, requests: int, rows: int, block_q: int) -> Iterator[tuple[int, int]]:
    """(request, block) of each program, as `_find_block` finds it, where every request has equally many rows."""
    first = [r * rows // block_q + r for r in range(requests)]
    for index in range(programs):
        request = max(r for r in range(requests) if first[r] <= index)
        block = index - first[request]
        if block * block_q < rows:
            yield request, block


def test_nodes_of_a_level_share_what_one_reads(monkeypatch):
    requests, nodes, context = 64, 32, 4096
    scratch = of(requests, 50, KV_HEADS, HEAD_DIM)
    grid = launched(
        monkeypatch, path_attention, "_path_attention_kernel",
        of(requests, nodes, HEADS, HEAD_DIM), of(999, KV_HEADS, 16, 2 * HEAD_DIM),
        of(requests, 512, dtype=torch.int32), of(requests, dtype=torch.int32), scratch, scratch,
        of(requests, nodes, 2, dtype=torch.int64), scale=0.1, backend="triton",
    )  # fmt: skip
    block_q, splits = grid.constants["BLOCK_Q"], grid.constants["SPLITS"]
    blocks = -(-nodes // block_q)
    assert grid.grid == (requests * blocks, KV_HEADS, splits) and blocks > 1
    tiles = context // TILE

    def programs() -> Iterator[list[Tile]]:
        for split, head, index in product(range(splits), range(KV_HEADS), range(requests * blocks)):
            share = -(-tiles // splits)
            yield [(index // blocks, head, t) for t in range(split * share, min((split + 1) * share, tiles))]

    assert misses(programs()) <= 1.05 * requests * KV_HEADS * tiles


def test_nodes_of_verified_trees_are_one_program_a_block(monkeypatch):
    """Beside FlashAttention: no split, since a tree has one tile of nodes."""
    requests, rows = 8, 61
    tokens = requests * rows
    grid = launched(
        monkeypatch, node_attention.__globals__["_launch"], "tree_attention_kernel",
        of(tokens, HEADS, HEAD_DIM), of(HEADS, tokens, dtype=torch.float32), of(tokens, HEADS, HEAD_DIM),
        of(999, KV_HEADS, 16, 2 * HEAD_DIM), of(requests, 512, dtype=torch.int32),
        of(requests + 1, dtype=torch.int32), of(requests, dtype=torch.int32), *[of(tokens, dtype=torch.int64)] * 3,
        rows, 0.1, 0, 0.0, None, 1,
    )  # fmt: skip
    assert grid.grid == (tokens // grid.constants["BLOCK_Q"] + requests, KV_HEADS, 1)
