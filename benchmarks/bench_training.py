"""Trainer throughput: the fused loss and padded flash attention against a plain eager form of the same loss.

python benchmarks/bench_training.py --target DIR --data rows.jsonl.gz [--batches 4] [--json FILE]
Prints answer tokens/s, and those times the simulated steps, of forward and backward of the draft alone (the
target's states are made beforehand; CPU time), and the process's peak memory, the target's included.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vllm_eagle3.provenance import provenance
from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training.attention import Layout, ttt_mask
from vllm_eagle3.training.data import (
    Batch,
    draft_vocabulary,
    load_documents,
    make_batch,
    plan_batches,
    token_counts,
)
from vllm_eagle3.training.features import Features, Target
from vllm_eagle3.training.initialize import new_draft
from vllm_eagle3.training.losses import eager_head_loss
from vllm_eagle3.training.ttt import Chains, LossOptions, target_table, ttt_loss


def eager_loss(
    model: DraftModel, batch: Batch, features: Features, head: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """The same scalar the plain way: every row of every step, one 0/1 mask over all keys, all logits kept."""
    steps, total = options.steps, len(batch.tokens)
    layer, attn = model.draft_layer, model.draft_layer.self_attn
    chains = Chains.build(batch, steps)
    table, place = target_table(features, head, chains, steps)
    layout = Layout.build(batch.lengths, chains.rows)
    mask = ttt_mask(layout.document, steps).view(steps, total, steps, total)
    g = model.fuse(features.aux)
    keys, values, loss = [], [], torch.zeros(())
    weights = options.decay ** torch.arange(steps)
    for j in range(steps):
        x, residual = layer.inputs(model.embed(batch.tokens.roll(-1 - j)), g)
        cos, sin = model.rotary(layout.positions + j)
        k, v = attn.key_value(x, cos, sin)
        keys, values = [*keys, k], [*values, v]
        q, k, v = (
            t.transpose(0, 1)[None] for t in (attn.query(x, cos, sin), torch.cat(keys), torch.cat(values))
        )
        seen = mask[j, :, : j + 1].reshape(total, -1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        a = layer.output(out[0].transpose(0, 1), residual)
        g = model.next_g(a)
        valid = chains.valid[j]
        scale = valid.float() / valid.sum().clamp(min=1) * weights[j] / weights.sum()
        index = place[chains.at(j + 1, total)]
        normed = model.norm(a)[chains.rows]
        loss = loss + eager_head_loss(normed, model.lm_head.weight, table, index, scale, options.kind)
    return loss, loss.detach()


def measure(run: Callable[[int], Tensor], batches: int) -> tuple[float, float]:
    """CPU seconds a thread, and the process's peak memory in GB so far, of forward and backward."""
    started = time.process_time()
    for i in range(batches):
        run(i).backward()
    seconds = (time.process_time() - started) / torch.get_num_threads()
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--ttt-steps", type=int, default=7)
    parser.add_argument("--draft-vocab-size", type=int, default=12288)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    target = Target(args.target)
    documents = load_documents([args.data], len(target.embeddings))
    vocabulary = draft_vocabulary(token_counts(documents, len(target.embeddings)), args.draft_vocab_size)
    plan = plan_batches([len(d.tokens) for d in documents], args.batch_tokens, 0, 0)[: args.batches]
    batches = [make_batch([documents[i] for i in group]) for group in plan]
    features = [target.features(batch) for batch in batches]
    model = new_draft(target, vocabulary, {"fc_norm": True}, "target", 0, batches[0])
    model.embed_tokens.to(torch.bfloat16)
    head, options = target.head[model.target_ids], LossOptions(args.ttt_steps)
    answers = sum(int(batch.mask.sum()) for batch in batches)
    rows = []
    for name, loss in (("fused", ttt_loss), ("eager", eager_loss)):

        def run(i: int, loss: Callable[..., tuple[Tensor, Tensor]] = loss) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(model, batches[i], features[i], head, options)[0]

        first = float(run(0).detach())
        model.zero_grad()
        seconds, memory = measure(run, len(batches))
        model.zero_grad()
        row = {"loss": name, "value": first, "tokens_per_s": answers / seconds, "peak_gb": memory}
        row["tokens_per_s_per_step"] = row["tokens_per_s"] * args.ttt_steps
        rows.append(row)
        print(
            f"{name}: loss {first:.4f}, {row['tokens_per_s']:.0f} answer tokens/s, "
            f"{row['tokens_per_s_per_step']:.0f} a simulated step, peak memory {memory:.2f} GB"
        )
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items() if k not in ("json", "target", "data")}
        found = {"provenance": provenance([args.data], settings), "results": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
