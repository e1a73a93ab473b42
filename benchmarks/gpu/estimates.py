"""What each part of a step should take on an H100, by bytes, operations and launches: the tables of docs/gpu.md.

    python benchmarks/gpu/estimates.py            # writes the tables into docs/gpu.md
    python benchmarks/gpu/estimates.py --check    # fails where the page differs

Nothing here is measured. A part takes the longest of three times: reading its bytes, computing its products, launching
its kernels one after another. "Before" is the design that was replaced, "after" the present one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from roofline import (
    BANDWIDTH,
    BF16,
    FLOPS,
    FP8,
    FP32,
    LLAMA_8B,
    LLAMA_70B,
    Part,
    Shape,
    product,
    seconds,
)

from vllm_eagle3.kernels import MOST_ROWS
from vllm_eagle3.kernels.split_kv import choose_splits

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
START, END = "<!-- estimates -->\n", "<!-- /estimates -->\n"

FLASH_3, TRITON_PREFILL = 550e12, 90e12  # operations a second of causal attention over a prompt
SMALL = 15  # norms, rotation, activation and the like, in a pass of the draft
DEPTH, TOPK, NODES = 6, 10, 60
# Kernels of the growth's bookkeeping: first level, each later one, choice of nodes. As torch operations
# (counted when `kernels/tree_growth.py` replaced them), and of `TreeGrowth`, where one of each level gathers states.
OPERATIONS, PROGRAMS = (25, 34, 32), (2, 2, 1)
CHAIN = 4
PER_LAYER = {"weights": 9, "attention": 3}  # kernels of a layer; attention: prefix, nodes, merge
# Of the bandwidth, for the prefix of a tree: FlashAttention, and the kernel that it replaced.
DENSE_TREE_KERNEL, OLD_TREE_KERNEL = 0.85, 0.35


def draft_pass(shape: Shape, rows: int, width: int = BF16) -> list[Part]:
    """The draft's layer and head over `rows` rows, with weights of `width` bytes if there are few rows."""
    width = width if rows <= MOST_ROWS else BF16
    return [product(shape.draft_layer, rows, width), product(shape.head, rows, width), Part(nodes=SMALL)]


def target_step(shape: Shape, requests: int, rows: int, context: int, before: bool) -> dict[str, Part]:
    """Verification of `rows` rows a request: weights, and attention of all layers."""
    tokens = requests * rows
    keys = requests * context * shape.kv_token * shape.layers
    flops = 4.0 * tokens * context * shape.heads * shape.head_dim * shape.layers / shape.gpus
    if rows <= CHAIN + 1:
        attention = Part(keys / DENSE_TREE_KERNEL, flops)
    else:
        partial = tokens * shape.heads // shape.gpus * shape.head_dim * FP32
        blocks = requests * -(-rows * (shape.heads // shape.kv_heads) // 64)
        splits = choose_splits(torch.device("cpu"), max(shape.kv_heads // shape.gpus, 1) * blocks, partial)
        if before:
            merged = 2 * partial * splits * shape.layers if splits > 1 else 0
            attention = Part(keys / OLD_TREE_KERNEL + merged, flops)
        else:  # the prefix by FlashAttention, the nodes by a kernel, both merged
            merged = 6 * tokens * shape.heads // shape.gpus * shape.head_dim * BF16 * shape.layers
            attention = Part(keys / DENSE_TREE_KERNEL + merged, flops, PER_LAYER["attention"] * shape.layers)
    return {"weights": product(shape.target, tokens), "attention": attention}


def growth_step(shape: Shape, requests: int, context: int, width: int, programs: bool) -> list[Part]:
    """The levels behind the first draft step: layer, attention over the prefix, head, bookkeeping."""
    first, level, rerank = PROGRAMS if programs else OPERATIONS
    prefix = Part(requests * context * shape.kv_token / DENSE_TREE_KERNEL, nodes=4)
    one = [*draft_pass(shape, requests * TOPK, width), prefix, Part(nodes=level)]
    return [Part(nodes=first), *one * (DEPTH - 1), Part(nodes=rerank)]


def tree_step(shape: Shape, requests: int, context: int, width: int, before: bool) -> float:
    """Seconds of a whole step of trees."""
    accepted = requests * (DEPTH + 1)  # rows of the accepted paths, which the first draft step reads
    first = [product(shape.fc, accepted), *draft_pass(shape, accepted, width)]
    verified = target_step(shape, requests, NODES, context, before).values()
    return seconds([*verified, *first, *growth_step(shape, requests, context, width, programs=not before)])


def ms(parts: Iterable[Part]) -> str:
    return f"{1e3 * seconds(parts):.2f}"


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    lines = [head, "| --- |" + " ---: |" * (head.count("|") - 2)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def weights_table(shape: Shape) -> str:
    """What each part reads."""
    names = {
        "target, all layers and the head": shape.target, "draft: fc": shape.fc, "draft: qkv": shape.qkv,
        "draft: layer, qkv among it": shape.draft_layer, "draft: head": shape.head,
    }  # fmt: skip
    rows = [
        (
            name,
            f"{weights * BF16 / 1e6:,.0f}",
            f"{1e3 * weights * BF16 / BANDWIDTH:.3f}",
            f"{FLOPS / BANDWIDTH:.0f}",
        )
        for name, weights in names.items()
    ]
    return table(
        "| weights in bf16, on each GPU | MB | ms to read | rows from which products take longer |", rows
    )


def steps_table(shape: Shape) -> str:
    """Whole steps of chains and trees."""
    rows = []
    for requests, context in ((1, 1024), (1, 8192), (8, 1024), (32, 1024), (32, 8192)):
        none = [*target_step(shape, requests, 1, context, before=False).values()]
        chain = [*target_step(shape, requests, CHAIN + 1, context, before=False).values()]
        chain += [product(shape.fc, requests * (CHAIN + 1)), *draft_pass(shape, requests) * CHAIN]
        times = [seconds(none), seconds(chain)]
        times += [tree_step(shape, requests, context, BF16, before=True)]
        times += [tree_step(shape, requests, context, width, before=False) for width in (BF16, FP8)]
        rows.append((f"{requests} at {context:,}", *(f"{1e3 * time:.2f}" for time in times)))
    head = f"| requests at context | none | chain of {CHAIN} | tree before | tree after | tree after, `fp8_draft` |"
    return "Milliseconds of a step.\n\n" + table(head, rows)


def parts_table(shape: Shape) -> str:
    """The parts of the steps of one tree, and of eight with longer contexts."""
    rows = []
    for requests, context in ((1, 1024), (8, 8192)):
        old, new = (target_step(shape, requests, NODES, context, before) for before in (True, False))
        at = f"{requests} at {context:,}"
        for name, title in (("weights", "target's products"), ("attention", "attention, all layers")):
            before, after = old[name], new[name]
            size = f"{before.bytes / 1e6:,.0f}, {after.bytes / 1e6:,.0f}"
            rows.append(
                (f"{at}: {title}", size, f"{shape.layers * PER_LAYER[name]}", ms([before]), ms([after]))
            )
        grown = growth_step(shape, requests, context, BF16, programs=False)
        for title, width in (("growth", BF16), ("growth, `fp8_draft`", FP8)):
            now = growth_step(shape, requests, context, width, programs=True)
            size, kernels = (
                f"{sum(getattr(p, name) for p in grown) / unit:,.0f}, {sum(getattr(p, name) for p in now) / unit:,.0f}"
                for name, unit in (("bytes", 1e6), ("nodes", 1))
            )
            rows.append((f"{at}: {title}", size, kernels, ms(grown), ms(now)))
    counts = [first + (DEPTH - 1) * level + rerank for first, level, rerank in (OPERATIONS, PROGRAMS)]
    times = [ms([Part(nodes=count)]) for count in counts]
    rows.append(("bookkeeping of the growth, in it", "", f"{counts[0]}, {counts[1]}", *times))
    return table("| part of a tree's step | MB before, after | kernels | ms before | ms after |", rows)


def prefill_table(shape: Shape) -> str:
    """Time to the first token of an engine with trees: prompts' attention by Triton before, by FlashAttention after."""
    rows = []
    for length in (1024, 8192, 32768):
        weights = product(shape.target, length).seconds
        flops = 2.0 * length**2 * shape.heads * shape.head_dim * shape.layers / shape.gpus
        before, after = weights + flops / TRITON_PREFILL, weights + flops / FLASH_3
        rows.append((f"{length:,}", f"{1e3 * before:.0f}", f"{1e3 * after:.0f}", f"{before / after:.2f}"))
    return table("| tokens of the prompt | ms before | ms after | ratio |", rows)


def zero_table(shape: Shape) -> str:
    """What K = 0 adds to a step without speculation."""
    none = seconds(target_step(shape, 1, 1, 1024, before=False).values())
    whole = seconds([product(shape.fc, 1), *draft_pass(shape, 1)])
    least = seconds([product(shape.fc, 1), product(shape.qkv, 1)])
    sizes = [shape.fc + shape.draft_layer + shape.head, shape.fc + shape.qkv]
    rows = [
        (name, f"{size * BF16 / 1e6:,.0f}", f"{time / none:+.1%}")
        for name, size, time in zip(
            ("before: layer and head", "after: keys and values only"), sizes, (whole, least), strict=True
        )
    ]
    return table("| K = 0 | MB of weights | of a step of one request |", rows)


def tables() -> str:
    """Everything between the marks of the page."""
    blocks = []
    for shape in (LLAMA_8B, LLAMA_70B):
        blocks += [f"### {shape.name}\n"]
        blocks += [
            make(shape) for make in (weights_table, steps_table, parts_table, prefill_table, zero_table)
        ]
    return "\n".join(blocks)


def page(text: str) -> str:
    """The page with fresh tables. Raises ValueError where it has no place for them."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{PAGE}: expected the lines {START.strip()} and {END.strip()}, found them not")
    return before + START + "\n" + tables() + "\n" + END + after


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page differs")
    args = parser.parse_args(argv)
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if args.check:
        if new != old:
            print(f"{PAGE} differs from what this script makes: run it without --check")
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
