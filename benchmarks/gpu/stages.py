"""The stages of benchmarks/gpu/run.sh: each a few commands with a time limit, results as JSON when it ends."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = "tests/data/prompts.jsonl"
CLI = [sys.executable, "-m", "vllm_eagle3.cli"]
SHAPE = ["--shape", "llama-3.1-8b", "--modes", "none,native,adaptive,chain,auto"]


@dataclass(frozen=True)
class Stage:
    """One stage; `OUT` in a command stands for the output folder."""

    name: str
    minutes: float
    commands: tuple[tuple[str, ...], ...]
    dry: tuple[tuple[str, ...], ...]
    """What runs instead without a GPU: the same programs at tiny sizes."""


def bench(name: str) -> tuple[str, ...]:
    return (sys.executable, f"benchmarks/bench_{name}.py", "--out", f"OUT/{name}.json")


def dry_bench(name: str) -> tuple[str, ...]:
    return (*bench(name), "--dry-run")


def evaluate(out: str, *arguments: str) -> tuple[str, ...]:
    return (*CLI, "eval", *target(), "--data", PROMPTS, "--json", f"OUT/{out}.json", *arguments)


def sweep(out: str, *arguments: str) -> tuple[str, ...]:
    return (*CLI, "sweep", "--json", f"OUT/{out}.json", "--plot", f"OUT/{out}.png", *arguments)


def target() -> tuple[str, ...]:
    return ("--target", os.environ["TARGET"]) if "TARGET" in os.environ else ()


def stages() -> list[Stage]:
    """All stages, most valuable first."""
    kernels = ("concat_fc", "norm_concat", "head_topk", "tree_steps", "linear_fp8")
    tiny = ("--limit", "2", "--max-tokens", "8", "--enforce-eager")
    modes = ("--modes", "none,native,chain,tree")
    doctor = (*CLI, "doctor")
    tests = (sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels")
    return [
        Stage("environment", 2, (doctor,), (doctor,)),
        Stage("kernels-correct", 6, (tests,), ((*tests, "--collect-only"),)),
        Stage(
            "smollm2",
            10,
            (
                evaluate("identity_fp32", *modes, "--dtype", "float32", "--max-tokens", "64"),
                evaluate("smollm2_batch1", *modes, "--max-tokens", "128"),
                evaluate("smollm2_batch8", *modes, "--max-tokens", "128", "--batch-size", "8"),
            ),
            (evaluate("identity_fp32", "--modes", "none,chain", "--dtype", "float32", *tiny),),
        ),
        Stage("kernel-times", 8, tuple(map(bench, kernels)), tuple(map(dry_bench, kernels))),
        Stage(
            "sweep-8b",
            10,
            (sweep("sweep_8b", *SHAPE, "--batch-sizes", "1,2,4,8,16,24,32,48,56,128,256", "--repeats", "3"),),
            (),
        ),
        Stage(
            "sweep-smollm2",
            8,
            (
                sweep(
                    "sweep_smollm2",
                    *target(),
                    "--modes",
                    "none,native,adaptive,chain,tree,auto",
                    "--repeats",
                    "3",
                ),
            ),
            (),
        ),
    ]


def run(stage: Stage, out: Path, dry: bool) -> str:
    """Run a stage's commands; returns "ok", "failed", "out of time", or "nothing to do" (dry)."""
    deadline = time.monotonic() + 60 * stage.minutes
    commands = stage.dry if dry else stage.commands
    with (out / f"{stage.name}.log").open("w", encoding="utf-8") as log:
        for command in commands:
            words = [word.replace("OUT/", f"{out}/") for word in command]
            try:
                done = subprocess.run(
                    words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=deadline - time.monotonic()
                )
            except subprocess.TimeoutExpired:
                return "out of time"
            if done.returncode:
                return "failed"
    return "ok" if commands else "nothing to do"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no GPU needed")
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=[stage.name for stage in stages()])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / "stages.json"
    ended: dict[str, dict[str, object]] = json.loads(state.read_text()) if state.exists() else {}
    for stage in stages():
        if (args.only and stage.name not in args.only) or ended.get(stage.name, {}).get("result") == "ok":
            continue
        started = time.monotonic()
        result = run(stage, args.out.resolve(), args.dry_run)
        ended[stage.name] = {"result": result, "seconds": round(time.monotonic() - started, 1)}
        state.write_text(json.dumps(ended, indent=1) + "\n")
        print(f"{stage.name:16} {result:13} {ended[stage.name]['seconds']} s", flush=True)
    return int(any(stage["result"] not in ("ok", "nothing to do") for stage in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
