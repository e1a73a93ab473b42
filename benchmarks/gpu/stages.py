"""The stages of benchmarks/gpu/run.sh: each a few commands with a time limit, results as JSON when it ends."""

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
SIZES = "1,2,4,8,16,24,32,48,56,128,256"
Commands = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Stage:
    """One stage; `OUT` in a command stands for the output folder."""

    name: str
    minutes: float
    commands: Commands
    dry: Commands
    """What runs instead without a GPU: the same programs at tiny sizes."""
    after: Callable[[Path], None] | None = None
    """Called with the output folder when the commands have ended, however they did."""


def bench(name: str) -> tuple[str, ...]:
    return (sys.executable, f"benchmarks/bench_{name}.py", "--out", f"OUT/{name}.json")


def dry_bench(name: str) -> tuple[str, ...]:
    return (*bench(name), "--dry-run")


def evaluate(out: str, *arguments: str) -> tuple[str, ...]:
    return (*CLI, "eval", *target(), "--data", PROMPTS, "--json", f"OUT/{out}.json", *arguments)


def sweep(out: str, *arguments: str) -> tuple[str, ...]:
    return (*CLI, "sweep", "--json", f"OUT/{out}.json", "--plot", f"OUT/{out}.png", *arguments)


def train(*arguments: str) -> Commands:
    """The shipped head trained on; nothing without prompts, or without a target to answer them."""
    if not target() or not os.environ.get("PROMPTS"):
        return ()
    prompts = ("--prompts", *os.environ["PROMPTS"].split(":"))
    head = ("--init-from", f"checkpoints/{HEAD}", "--fc-norm", "--copy-loss", "0.15")
    return ((*CLI, "train", *target(), *prompts, *head, "--out", "OUT/train", *arguments),)


def publish_head(out: Path) -> None:
    """The best head that OUT/train has, in shards of at most 15 MiB, to OUT/<name of the shipped head>."""
    source = next((path for name in ("best", "head") if (path := out / "train" / name).is_dir()), None)
    if source is None:
        return
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    folder = out / HEAD
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(source / "model.safetensors")
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD_BYTES - (1 << 16))  # less the files' headers


def target() -> tuple[str, ...]:
    return ("--target", os.environ["TARGET"]) if "TARGET" in os.environ else ()


def stages() -> list[Stage]:
    """All stages, most valuable first."""
    kernels = ("concat_fc", "head_topk", "tree_steps", "linear_fp8")
    tiny = ("--limit", "2", "--max-tokens", "8", "--enforce-eager")
    modes = ("--modes", "none,native,chain,tree")
    doctor = (*CLI, "doctor")
    tests = (sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels")
    shape = ("--shape", "llama-3.1-8b", "--batch-sizes", SIZES, "--repeats", "2", "--native-tokens")
    short = ("--batch-sizes", "1,2", "--repeats", "1", "--modes", "none,auto")
    answers = "--limit 4 --max-tokens 8 --max-model-len 512 --max-num-seqs 2 --enforce-eager"
    steps = ("--ttt-steps", "2", "--max-steps", "2", "--eval-every", "2", "--batch-tokens", "256")
    return [
        Stage("environment", 2, (doctor,), (doctor,)),
        Stage("kernels-correct", 6, (tests,), (("env", "TRITON_INTERPRET=1", *tests, "--collect-only"),)),
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
        # All engines of a sweep live on the GPU together, with 16 GB of weights each: four at most.
        Stage(
            "sweep-8b",
            10,
            (sweep("sweep_8b", *shape, "3", "--modes", "none,native,chain,auto"),),
            (sweep("sweep_8b", "--dry-run", *short),),
        ),
        Stage(
            "sweep-smollm2",
            8,
            (
                sweep(
                    "sweep_smollm2", *target(), "--modes", "none,native,adaptive,chain,tree,auto",
                    "--repeats", "3",
                ),
            ),
            (sweep("sweep_smollm2", *target(), *short, "--max-tokens", "4", "--enforce-eager"),),
        ),
        Stage("tree-attention", 3, (bench("tree_attention"),), (dry_bench("tree_attention"),)),
        Stage("draft-phase", 6, (bench("draft_phase"),), (dry_bench("draft_phase"),)),
        Stage(
            "sweep-8b-native", 10, (sweep("sweep_8b_native", *shape, "1,2,5", "--modes", "none,native"),), ()
        ),
        Stage(
            "sweep-8b-adaptive",
            10,
            (sweep("sweep_8b_adaptive", *shape, "3", "--modes", "none,adaptive,auto"),),
            (),
        ),
        Stage(
            "train",
            30,
            train("--ttt-steps", "7", "--lr", "1e-3", "--batch-tokens", "8192", "--epochs", "3"),
            train("--generate", answers, "--limit", "2", *steps),
            publish_head,
        ),
    ]  # fmt: skip


def run_command(words: list[str], log: Any, seconds: float) -> int:
    """Exit code of a command. Whatever it has started ends with it: engines left over would hold the GPU's memory.

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
    for command in commands:
        words = [word.replace("OUT/", f"{out}/") for word in command]
        try:
            if run_command(words, log, deadline - time.monotonic()):
                return "failed"
        except subprocess.TimeoutExpired:
            return "out of time"
    return "ok" if commands else "nothing to do"


def run(stage: Stage, out: Path, dry: bool) -> str:
    """Run a stage's commands; returns "ok", "failed", "out of time", or "nothing to do"."""
    deadline = time.monotonic() + 60 * stage.minutes * (3 if dry else 1)  # on a few busy CPU cores
    with (out / f"{stage.name}.log").open("w", encoding="utf-8") as log:
        result = run_commands(stage.dry if dry else stage.commands, out, deadline, log)
        if stage.after is not None:
            stage.after(out)
    return result


def targets(stage: Stage, out: Path) -> str:
    """How many targets the stage's results met, such as "3 of 4 met": of rows with a "target", those measured."""
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
    """Markdown: a line for every stage that has ended."""
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
    summary = table(ended, args.out)
    (args.out / "summary.md").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{summary}" + ("\n\nDry run: the figures mean nothing." if args.dry_run else ""))
    return int(any(stage["result"] not in ("ok", "nothing to do") for stage in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
