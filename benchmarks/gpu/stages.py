"""The stages of benchmarks/gpu/run.sh. Each runs a few commands within a time limit and then writes its results."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = "tests/data/prompts.jsonl"
HEAD = "SmolLM2-135M-Instruct-EAGLE3"
SHARD_BYTES = 15 << 20
CLI = [sys.executable, "-m", "vllm_eagle3.cli"]
SIZES = "1,4,16,56,256"
MINUTES_A_CALL = 9  # some GPU hosts stop a command after ten minutes
ALONE = 25  # minutes of the stage `train`, which runs in a call by itself
Commands = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Stage:
    """One stage; `OUT` in a command stands for the output folder."""

    name: str
    minutes: float
    """Limit; 0 for a stage that is not part of the timed plan and has ALONE minutes."""
    commands: Commands
    dry: Commands
    """The commands of a dry run without a GPU: the same programs at tiny sizes."""
    after: Callable[[Path], None] | None = None
    """Called with the output folder when the commands have ended, whether or not they succeeded."""


def bench(name: str) -> tuple[str, ...]:
    return (sys.executable, f"benchmarks/bench_{name}.py", "--out", f"OUT/{name}.json")


def dry_bench(name: str) -> tuple[str, ...]:
    return (*bench(name), "--dry-run")


def evaluate(out: str, *arguments: str) -> tuple[str, ...]:
    return (*CLI, "eval", *target(), "--data", PROMPTS, "--json", f"OUT/{out}.json", *arguments)


def sweep(out: str, *arguments: str) -> tuple[str, ...]:
    return (*CLI, "sweep", "--json", f"OUT/{out}.json", "--plot", f"OUT/{out}.png", *arguments)


def train(*arguments: str) -> Commands:
    """Commands that train the shipped head further. None without prompts, or without a target to answer them."""
    if not target() or not os.environ.get("PROMPTS"):
        return ()
    prompts = ("--prompts", *os.environ["PROMPTS"].split(":"))
    head = ("--init-from", f"checkpoints/{HEAD}", "--fc-norm", "--copy-loss", "0.15")
    return ((*CLI, "train", *target(), *prompts, *head, "--out", "OUT/train", *arguments),)


def publish_head(out: Path) -> None:
    """Copy the best head in OUT/train to OUT/<name of the shipped head>, in shards of at most 15 MiB."""
    source = next((path for name in ("best", "head") if (path := out / "train" / name).is_dir()), None)
    if source is None:
        return
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    folder = out / HEAD
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(source / "model.safetensors")
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD_BYTES - (1 << 16))  # room for headers


def target() -> tuple[str, ...]:
    return ("--target", os.environ["TARGET"]) if "TARGET" in os.environ else ()


# Long: a table.
def stages() -> list[Stage]:
    """All stages, the most valuable first. `calls` groups them."""
    kernels = ("concat_fc", "head_topk", "tree_steps", "linear_fp8")
    tiny = ("--limit", "2", "--max-tokens", "8", "--enforce-eager")
    short = ("--batch-sizes", "1,2", "--repeats", "1", "--modes", "none,auto")
    growth = (sys.executable, "benchmarks/gpu/growth_graph.py", "--out", "OUT/growth_graph.json")
    tests = (sys.executable, "-m", "pytest", "-q", "tests/kernels")
    shape = ("--shape", "llama-3.1-8b", "--batch-sizes", SIZES, "--repeats", "2", "--native-tokens", "3")
    answers = "--limit 4 --max-tokens 8 --max-model-len 512 --max-num-seqs 2 --enforce-eager"
    steps = ("--ttt-steps", "2", "--max-steps", "2", "--eval-every", "2", "--batch-tokens", "256")
    modes, trees = ("--modes", "none,native,chain,tree"), ("--modes", "none,tree")
    doctor = (*CLI, "doctor")
    return [
        Stage("environment", 0.5, (doctor,), (doctor,)),
        # Without an engine: an error here is in the kernels or in the growth, not in the use of vLLM.
        Stage("growth-graph", 1, (growth,), ((*growth, "--dry-run"),)),
        Stage("kernels-correct", 2.5, (tests,), (("env", "TRITON_INTERPRET=1", *tests, "--collect-only"),)),
        # The same prompts with and without CUDA graphs: tau must be the same.
        Stage(
            "tree-graphs",
            4,
            (
                evaluate("tree_graphs", *modes, "--max-tokens", "64", "--limit", "20"),
                evaluate("tree_eager", *trees, "--max-tokens", "64", "--limit", "20", "--enforce-eager"),
                evaluate("identity_fp32", *trees, "--dtype", "float32", "--max-tokens", "64", "--limit", "20"),
            ),
            (evaluate("identity_fp32", "--modes", "none,chain", "--dtype", "float32", *tiny),),
        ),
        Stage(
            "sweep-smollm2",
            4,
            (
                sweep(
                    "sweep_smollm2", *target(), "--modes", "none,native,chain,tree,auto", "--repeats", "2",
                    "--batch-sizes", "1,2,4,8,16,32,56", "--native-tokens", "3", "--max-tokens", "64",
                ),
            ),
            (sweep("sweep_smollm2", *target(), *short, "--max-tokens", "4", "--enforce-eager"),),
        ),
        Stage("tree-attention", 1.5, (bench("tree_attention"),), (dry_bench("tree_attention"),)),
        Stage("ttft", 3, (bench("ttft"),), (dry_bench("ttft"),)),
        Stage("draft-phase", 2.5, (bench("draft_phase"),), (dry_bench("draft_phase"),)),
        Stage("kernel-times", 2, tuple(map(bench, kernels)), tuple(map(dry_bench, kernels))),
        # Two engines of 16 GB of weights fit on one GPU beside their caches, graphs and profile.
        Stage(
            "sweep-8b",
            4,
            (
                sweep("sweep_8b_native", *shape, "--modes", "none,native"),
                sweep("sweep_8b_auto", *shape, "--modes", "none,auto"),
            ),
            (sweep("sweep_8b", "--dry-run", *short),),
        ),
        Stage(
            "train",
            0,
            train("--ttt-steps", "7", "--lr", "1e-3", "--batch-tokens", "8192", "--epochs", "3"),
            train("--generate", answers, "--limit", "2", *steps),
            publish_head,
        ),
    ]  # fmt: skip


def calls(all_stages: list[Stage], most: float = MINUTES_A_CALL) -> list[list[Stage]]:
    """The timed stages in groups of at most `most` minutes, in order. A stage without a time is a group by itself."""
    groups: list[list[Stage]] = []
    for stage in all_stages:
        minutes = sum(other.minutes for other in groups[-1]) if groups else most
        if not stage.minutes or minutes + stage.minutes > most:
            groups.append([])
        groups[-1].append(stage)
    return groups


def run_command(words: list[str], log: Any, seconds: float) -> int:
    """Run a command and return its exit code. All processes that it started are ended, to free the GPU's memory.

    Raises subprocess.TimeoutExpired after `seconds`.
    """
    process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(timeout=max(seconds, 1))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_commands(commands: Commands, out: Path, deadline: float, log: Any) -> str:
    """Run all commands, even if one fails. Returns "ok", "N of M failed", "out of time" or "nothing to do"."""
    failed = 0
    for command in commands:
        words = [word.replace("OUT/", f"{out}/") for word in command]
        log.write(f"$ {' '.join(words)}\n")
        log.flush()
        try:
            failed += run_command(words, log, deadline - time.monotonic()) != 0
        except subprocess.TimeoutExpired:
            return "out of time"
    if not commands:
        return "nothing to do"
    return f"{failed} of {len(commands)} failed" if failed else "ok"


def run(stage: Stage, out: Path, dry: bool) -> str:
    """Run a stage's commands and return the result of `run_commands`."""
    minutes = stage.minutes or ALONE
    deadline = time.monotonic() + 60 * minutes * (6 if dry else 1)  # on a few busy CPU cores
    with (out / f"{stage.name}.log").open("w", encoding="utf-8") as log:
        result = run_commands(stage.dry if dry else stage.commands, out, deadline, log)
        if stage.after is not None:
            stage.after(out)
    return result


def targets(stage: Stage, out: Path) -> str:
    """How many targets the stage's results met, such as "3 of 4 met". Counts measured rows with a "target"."""
    rows: list[dict[str, Any]] = []
    for word in {word for command in stage.commands for word in command if word.endswith(".json")}:
        path = out / word.removeprefix("OUT/")
        if word.startswith("OUT/") and path.exists():
            rows += json.loads(path.read_text(encoding="utf-8"))["results"]
    asked = [row for row in rows if "target" in row]
    measured = [row["met"] for row in asked if row["met"] is not None]
    if not asked:
        return ""
    return f"{sum(measured)} of {len(measured)} met" if measured else f"{len(asked)} unmeasured"


def table(ended: dict[str, dict[str, object]], out: Path) -> str:
    """A Markdown table with a line for each stage that has ended."""
    lines = ["| stage | result | seconds | targets |", "| --- | --- | --- | --- |"]
    for stage in stages():
        if (found := ended.get(stage.name)) is not None:
            lines.append(f"| {stage.name} | {found['result']} | {found['seconds']} | {targets(stage, out)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no GPU needed")
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=[stage.name for stage in stages()])
    parser.add_argument(
        "--call", type=int, metavar="N", help=f"the stages of the N-th {MINUTES_A_CALL} minutes, from 1"
    )
    args = parser.parse_args()
    groups = calls(stages())
    if args.call is not None:
        if args.only or not 1 <= args.call <= len(groups):
            parser.error(
                f"--call: expected a number from 1 to {len(groups)}, and no --only; found {args.call}"
            )
        args.only = [stage.name for stage in groups[args.call - 1]]
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
    summary = table(ended, args.out)
    (args.out / "summary.md").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{summary}" + ("\n\nDry run: the figures have no meaning." if args.dry_run else ""))
    return int(any(stage["result"] not in ("ok", "nothing to do") for stage in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
