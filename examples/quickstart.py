"""Eight real prompts without and with EAGLE-3: texts, identity, tokens/s, speed-up, tau, acceptance by position.

python examples/quickstart.py [--json FILE]      exit code 1 if the greedy fp32 texts differ
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_eagle3.evaluation.cli import add_widen
from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.evaluation.evaluate import run_in_process
from vllm_eagle3.evaluation.metrics import TaskRun
from vllm_eagle3.evaluation.settings import EvalSettings
from vllm_eagle3.evaluation.sweep.run import sweep
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.evaluation.widen import widened
from vllm_eagle3.provenance import provenance

PROMPTS = Path(__file__).parents[1] / "tests" / "data" / "prompts.jsonl"


def eight_prompts(folder: Path) -> Path:
    """Every fifth of the repository's forty prompts, first turns only."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()][::5]
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps(row | {"turns": row["turns"][:1], "task": "quickstart"}) + "\n" for row in rows)
    )
    return path


def texts(target: Path, data: Path, runs: dict[str, list[TaskRun]]) -> bool:
    """Prints prompts and answers; returns whether the answers are the same token for token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    plain, ours = (runs[mode][0].answers for mode in ("none", "chain"))
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        same = plain[row["id"]] == ours[row["id"]]
        print(
            f"\n> {row['turns'][0]}\n{tokenizer.decode(ours[row['id']][0], skip_special_tokens=True).strip()}"
        )
        print("  [the same without speculation]" if same else "  [DIFFERS from the text without speculation]")
    return plain == ours


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--num-speculative-tokens", type=int, default=3, metavar="K")
    parser.add_argument("--repeats", type=int, default=5, help="paired timings (after one that warms up)")
    parser.add_argument("--max-tokens", type=int, default=96)
    add_widen(parser)
    args = parser.parse_args()
    target, draft = default_pair()
    if args.widen is not None:
        target = widened(target, args.widen)
    with tempfile.TemporaryDirectory() as folder:
        data = eight_prompts(Path(folder))
        common: dict[str, Any] = {
            "target": str(target),
            "draft": str(draft),
            "data": (str(data),),
            "num_speculative_tokens": args.num_speculative_tokens,
            "max_tokens": args.max_tokens,
            "max_model_len": 1024,
        }
        print("1. Are the texts the target's? Greedy, fp32, without and with EAGLE-3")
        settings = EvalSettings(
            **common, modes=("none", "chain"), batch_size=4, dtype="float32", enforce_eager=True
        )
        runs = {mode: run_in_process(mode, settings) for mode in settings.modes}
        identical = texts(target, data, runs)
        print("\n2. How fast? Batch 1, bf16, all sides compiled alike, taking turns; the engines start first")
        timing = SweepSettings(
            **common,
            batch_sizes=(1,),
            modes=("none", "native", "auto"),  # as served by default
            native_tokens=(args.num_speculative_tokens,),
            repeats=args.repeats,
        )
        results = {row["mode"]: row for row in sweep(timing)["results"]}
        made = provenance([PROMPTS], {"identity": settings.public(), "speed": timing.public()})
    auto, native = results["auto"], results["native"]
    report = {
        "identical": identical,
        "tau": runs["chain"][0].tau,
        "n_alpha": runs["chain"][0].n_alpha,
        "speedup": auto["ratio_to_none"],
        "speedup_over_native": paired_ratio(auto, native),
        "tokens_per_s": {mode: results[mode]["tokens_per_s"] for mode in ("none", "native", "auto")},
        "provenance": made,
    }
    print(f"\ngreedy fp32 texts identical: {identical}")
    print(f"chains of {args.num_speculative_tokens}: tau {report['tau']:.2f}; acceptance by position "
          + ", ".join(f"{share:.2f}" for share in report["n_alpha"]))  # fmt: skip
    for mode, name in (("none", "no speculation"), ("native", "stock eagle3"), ("auto", "vllm-eagle3")):
        print(f"{name:15} {results[mode]['tokens_per_s']:7.1f} tokens/s")
    print(
        f"speed-up {report['speedup']:.2f}x, {report['speedup_over_native']:.2f}x over stock eagle3 (bf16, batch 1)"
    )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if identical else 1


def paired_ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Median of the paired ratios of two engines' runs."""
    ratios = sorted(a / b for a, b in zip(ours["runs"], theirs["runs"], strict=True))
    middle = len(ratios) // 2
    return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2


if __name__ == "__main__":
    sys.exit(main())
