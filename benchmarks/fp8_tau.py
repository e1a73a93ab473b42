"""What rounding a draft's weights to fp8 costs in acceptance: tau of the reference decoder, with and without.

    python benchmarks/fp8_tau.py --out benchmarks/results/fp8_tau_cpu.json --data tests/data/prompts.jsonl

Each prompt is answered by the demo's target with its draft as it is, with a rounded head, with rounded linear layers,
and with both. Weights are rounded as `{"eagle3": {"fp8_draft": true}}` does on a GPU: one scale for each output row,
activations as they are. Greedy answers hardly depend on the draft (only where two tokens are nearly equal), so every
variant drafts for the same texts, and the differences are paired by prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.engines import ReferenceEngine
from vllm_eagle3.evaluation.settings import EvalSettings, load_tasks
from vllm_eagle3.kernels import quant_fp8
from vllm_eagle3.provenance import provenance
from vllm_eagle3.reference.decode import Decoded, Proposer, chain, decode, eagle2_tree
from vllm_eagle3.reference.draft import DraftModel

HEAD = ("lm_head",)
LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS = {"as it is": (), "fp8 head": HEAD, "fp8 layer": LAYER, "fp8 head and layer": HEAD + LAYER}
PROPOSERS: dict[str, Proposer] = {"chain of 5": chain(5), "tree 6/10/60": eagle2_tree(6, 10, 60)}


@torch.inference_mode()
def rounded(draft: DraftModel, names: Sequence[str]) -> DraftModel:
    """A copy of the draft whose linear layers with these names have weights that went through fp8."""
    copy = deepcopy(draft)
    for name, module in copy.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] in names:
            w8, scale = quant_fp8(module.weight)
            module.weight.copy_(w8.to(torch.float32) * scale[:, None])
    return copy


def summary(answers: dict[str, list[Decoded]]) -> list[dict[str, object]]:
    """Tau of each variant, and how far it is from that of the draft as it is: mean over prompts, standard error."""
    base = answers["as it is"]
    rows = []
    for name, found in answers.items():
        steps = sum(len(answer.accepted) for answer in found)
        accepted = sum(sum(answer.accepted) for answer in found)
        apart = torch.tensor(
            [tau(mine) / tau(plain) - 1 for mine, plain in zip(found, base, strict=True)], dtype=torch.float64
        )
        same = all(mine.tokens == plain.tokens for mine, plain in zip(found, base, strict=True))
        rows.append(
            {
                "variant": name, "tau": 1 + accepted / steps, "verifications": steps, "answers": len(found),
                "relative_change": float(apart.mean()),
                "standard_error": float(apart.std()) / len(found) ** 0.5 if len(found) > 1 else None,
                "same_answers": same,
            }
        )  # fmt: skip
    return rows


def tau(answer: Decoded) -> float:
    """Tokens a verification of one answer."""
    return 1 + sum(answer.accepted) / len(answer.accepted)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, help="prompts, JSON lines with `turns`")
    parser.add_argument("--limit", type=int, default=None, help="prompts per file")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--proposers", nargs="+", choices=PROPOSERS, default=list(PROPOSERS))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, after each prompt")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    target, draft = default_pair()
    settings = EvalSettings(
        str(target), str(draft), tuple(options.data), ("reference-chain",), max_tokens=options.max_tokens,
        limit=options.limit,
    )  # fmt: skip
    made = provenance(settings.data, settings.public() | {"proposers": options.proposers})
    engine = ReferenceEngine("reference-chain", settings)
    drafts = {name: rounded(engine.draft, layers) for name, layers in VARIANTS.items()}
    answers: dict[str, dict[str, list[Decoded]]] = {
        proposer: {name: [] for name in VARIANTS} for proposer in options.proposers
    }
    for prompt in tqdm([prompt for prompts in load_tasks(settings).values() for prompt in prompts]):
        ids = engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.turns[0]}], add_generation_prompt=True, return_dict=False
        )
        for proposer, by_variant in answers.items():
            for name, found in by_variant.items():
                found.append(
                    decode(
                        engine.model, drafts[name], ids, PROPOSERS[proposer], options.max_tokens, engine.stop
                    )
                )
        results = [
            {"proposer": proposer, **row} for proposer, found in answers.items() for row in summary(found)
        ]
        report = {"provenance": made, "results": results}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in results:
        print(f"{row['proposer']}, {row['variant']}: tau {row['tau']:.3f} ({row['relative_change']:+.1%})")


if __name__ == "__main__":
    main()
