"""Throughput and memory of the trainer: a plain eager form, the trainer's first form, and each later improvement.

python benchmarks/bench_training.py --target DIR --data rows.jsonl.gz [--batches 6] [--equal-tokens N] [--json FILE]
Each arm is a separate process that takes whole optimiser steps (AdamW) on the same batches. It reports answer tokens
per second of CPU time and thread, and peak memory with the target. Arms:
  eager     every row of every simulated step, one 0/1 mask over all keys, all logits kept by autograd
  before    7 simulated steps, the loss in chunks of plain operations, the target run for every batch
  compiled  the loss and its gradient as one compiled function
  stored    in addition, the target's states are read from disk, as from the second epoch on
  steps     in addition, only 3 simulated steps, as in the first stages of a recipe
  share     in addition, only a third of the chains is simulated beyond step 1
With --equal-tokens N it compares instead the results of `before` and `share` after the same N answer tokens from the
same start: the loss of 5 simulated steps on held-out text, for several seeds.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vllm_eagle3.provenance import provenance
from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training import losses, trainer
from vllm_eagle3.training.attention import Layout, ttt_mask
from vllm_eagle3.training.data import Batch, draft_vocabulary, load_documents, make_batch, split, token_counts
from vllm_eagle3.training.features import Features, Target, TargetHead
from vllm_eagle3.training.initialize import new_draft
from vllm_eagle3.training.losses import eager_head_loss, row_loss
from vllm_eagle3.training.settings import LossOptions, TrainSettings
from vllm_eagle3.training.store import FeatureStore
from vllm_eagle3.training.trainer import TrainData, Trainer
from vllm_eagle3.training.ttt import Chains, target_table, ttt_loss

ARMS = {
    "eager": LossOptions(7),
    "before": LossOptions(7),
    "compiled": LossOptions(7),
    "stored": LossOptions(7),
    "steps": LossOptions(3),
    "share": LossOptions(3, chain_share=0.34),
}
STORED = ("stored", "steps", "share")


def eager_loss(
    model: DraftModel, batch: Batch, features: Features, head: TargetHead, options: LossOptions, *_: Any
) -> tuple[Tensor, Tensor]:
    """The same scalar in a plain form: all rows of all steps, one 0/1 mask over all keys, all logits kept."""
    steps, total = options.steps, len(batch.tokens)
    layer, attn = model.draft_layer, model.draft_layer.self_attn
    chains = Chains.build(batch, steps)
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
        table, index = target_table(features, head, chains.at(j + 1, total))
        normed = model.norm(a)[chains.rows]
        loss = loss + eager_head_loss(normed, model.lm_head.weight, table, index, scale, options.kind)
    return loss, loss.detach().expand(steps)


def make(args: argparse.Namespace, arm: str, folder: Path, seed: int = 0) -> tuple[Trainer, list[Any]]:
    """The trainer of an arm, and held-out documents."""
    target = Target(args.target)
    train, held_out = split(load_documents([args.data], len(target.embeddings)), 0.01)
    counts = token_counts(train, len(target.embeddings))
    model = new_draft(
        target,
        draft_vocabulary(counts, args.draft_vocab_size),
        {"fc_norm": True},
        "target",
        0,
        make_batch(train[:40]),
    )
    settings = TrainSettings(
        folder, loss=ARMS[arm], max_steps=10**6, lr=1e-3, batch_tokens=args.batch_tokens, seed=seed
    )
    store = FeatureStore(folder / "features", target, train) if arm in STORED else None
    return Trainer(settings, model, target, TrainData(train, store=store)), held_out


def patched(arm: str) -> Any:
    """A context in which the trainer uses the loss of an arm."""
    if arm == "eager":
        return patch.object(trainer, "ttt_loss", eager_loss)
    if arm == "before":
        return patch.object(losses, "compiled_row_loss", lambda *_: row_loss)
    return patch.object(losses, "CHUNK", losses.CHUNK)


def measure(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Tokens per second of `--batches` optimiser steps after a warm-up step, and the process's peak memory in GB."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder, patched(arm):
        run, _ = make(args, arm, Path(folder))
        groups = run.plan[: args.batches + 1]
        if run.data.store:
            for group in groups:
                run.data.store.features(make_batch([run.data.documents[i] for i in group]), group)
        run.train_step()
        rates = []
        for _ in range(args.batches):
            before, started = run.at.tokens, time.process_time()
            run.train_step()
            seconds = (time.process_time() - started) / torch.get_num_threads()
            rates.append(((run.at.tokens - before), seconds))
    tokens, seconds = (sum(x) for x in zip(*rates, strict=True))
    each = [n / s for n, s in rates]
    return {
        "arm": arm,
        "tokens_per_s": tokens / seconds,
        "median_batch": median(each),
        "slowest_batch": min(each),
        "fastest_batch": max(each),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


@torch.no_grad()
def held_out_loss(run: Trainer, documents: list[Any]) -> float:
    """Loss of 5 simulated steps, all chains, over held-out documents."""
    found = []
    for document in documents:
        batch = make_batch([document])
        with run.autocast():
            found.append(
                float(ttt_loss(run.model, batch, run.target.features(batch), run.head, LossOptions(5))[0])
            )
    return fmean(found)


def equal_tokens(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Held-out loss after `--equal-tokens` answer tokens, of each seed."""
    values = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder, patched(arm):
            run, held_out = make(args, arm, Path(folder), seed)
            while run.at.tokens < args.equal_tokens:
                run.train_step()
            values.append(held_out_loss(run, held_out[:40]))
    spread = stdev(values) if len(values) > 1 else 0.0
    return {"arm": arm, "tokens": args.equal_tokens, "loss": fmean(values), "spread": spread, "seeds": values}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--draft-vocab-size", type=int, default=12288)
    parser.add_argument("--equal-tokens", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--scratch", type=Path, help="where the arms keep features for the time of a run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        found = equal_tokens(args, args.arm) if args.equal_tokens else measure(args, args.arm)
        print(json.dumps(found))
        return
    rows = []
    for arm in args.arms or (("before", "share") if args.equal_tokens else ARMS):
        command = [sys.executable, *sys.argv, "--arm", arm]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    if args.json:
        settings = {
            k: str(v) for k, v in vars(args).items() if k not in ("json", "target", "data", "scratch")
        }
        found = {"provenance": provenance([args.data], settings), "results": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
