"""The paper's studies as commands: `python -m vllm_eagle3.evaluation.studies ablation | scaling`.

The ablation is table 2 of the paper, the scaling study figure 1, and both draw figure 7. Every arm is trained on the
same documents for the same steps, once for each seed. The reference decoder then measures greedy chains of
`--num-speculative-tokens` drafts on evaluation prompts. Results are means with 95 % intervals over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import AutoConfig

from vllm_eagle3.prompts import load_prompts, read_rows
from vllm_eagle3.provenance import provenance
from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training import cli
from vllm_eagle3.training.features import Target
from vllm_eagle3.training.job import build
from vllm_eagle3.training.settings import TrainJob
from vllm_eagle3.user_input import require_packages

logger = logging.getLogger(__name__)
# Table 2 of arXiv 2503.01840, LLaMA-Instruct 3.1 8B, tau on (MT-bench, GSM8K).
PAPER = {"EAGLE-2": (4.05, 4.24), "+ training-time test": (5.37, 5.22), "+ fused features": (6.13, 6.23)}
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by number of seeds
SHARES = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Measured:
    """One trained arm on one task; n_alpha[n] is the acceptance of draft n, given that all before it were accepted."""

    arm: str
    seed: int
    task: str
    tau: float
    n_alpha: list[float]
    verifications: int


def arms(job: TrainJob, num_layers: int) -> dict[str, TrainJob]:
    """The steps from EAGLE-2 to EAGLE-3, by name.

    EAGLE-2 reads the top layer's features and trains one simulated step with a regression to the next feature. The
    second arm drops the regression and simulates all steps (training-time test). The third arm fuses three layers.
    """
    loss = job.settings.loss
    # EAGLE's weights are 1 for the regression and 0.1 for the tokens.
    one = dataclasses.replace(loss, steps=1, feature_loss=10.0)
    top = dataclasses.replace(job, aux_layers=(num_layers,))
    return {
        "EAGLE-2": dataclasses.replace(top, settings=dataclasses.replace(job.settings, loss=one)),
        "+ training-time test": top,
        "+ fused features": job,
    }


def train_arm(job: TrainJob, name: str, seed: int) -> tuple[DraftModel, Target]:
    """Train one arm with one seed, in a directory of its own (resumed if there)."""
    folder = job.settings.out / name.replace(" ", "-").replace("+-", "") / f"seed-{seed}"
    job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, out=folder, seed=seed))
    if job.features_dir:
        layers = "default" if job.aux_layers is None else "-".join(map(str, job.aux_layers))
        limit = job.limit or "all"
        job = dataclasses.replace(job, features_dir=job.features_dir / f"layers-{layers}-documents-{limit}")
    trainer, _ = build(job)
    trainer.train()
    return trainer.model.to(trainer.target.embeddings.dtype).eval(), trainer.target


def measure(
    draft: DraftModel, target: Target, prompts: list[Path], limit: int, tokens: int, chain_length: int
) -> list[tuple[str, float, list[float], int]]:
    """Measure greedy chains on first turns, with `limit` prompts per file: (task, tau, n_alpha, verifications)."""
    from transformers import AutoTokenizer

    from vllm_eagle3.evaluation.metrics import TaskRun, count_chain
    from vllm_eagle3.reference.decode import chain, decode

    tokenizer: Any = AutoTokenizer.from_pretrained(target.path)
    results = []
    for path in prompts:
        run = TaskRun("reference-chain", path.stem)
        for prompt in load_prompts(str(path))[:limit]:
            chat = [{"role": "user", "content": prompt.turns[0]}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            answer = decode(target.model, draft, ids, chain(chain_length), tokens, {tokenizer.eos_token_id})
            run.count(
                len(answer.accepted),
                sum(answer.accepted),
                count_chain(answer.accepted, chain_length),
                sum(answer.drafted),
            )
        results.append((run.task, run.tau, run.n_alpha, run.verifications))
    return results


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval over seeds (0 for a single seed)."""
    half = T_975[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return fmean(values), half


def summary(results: list[Measured]) -> list[dict[str, Any]]:
    """One row per arm and task, in the order of measurement."""
    rows = []
    for arm, task in dict.fromkeys((r.arm, r.task) for r in results):
        runs = [r for r in results if (r.arm, r.task) == (arm, task)]
        mean, half = interval([r.tau for r in runs])
        depth = min(len(r.n_alpha) for r in runs)
        n_alpha = [fmean(r.n_alpha[n] for r in runs) for n in range(depth)]
        rows.append(
            {"arm": arm, "task": task, "tau": mean, "half": half, "seeds": len(runs), "n_alpha": n_alpha}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of tau by arm and task, with the paper's tau where the paper gives one."""
    lines = [
        "| arm | task | tau (95 % interval) | n-alpha, n = 0, 1, ... | paper's tau |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        place = {"mt_bench": 0, "gsm8k": 1}.get(row["task"])
        paper = f"{PAPER[row['arm']][place]:.2f}" if row["arm"] in PAPER and place is not None else "-"
        alphas = " ".join(f"{x:.2f}" for x in row["n_alpha"])
        lines.append(
            f"| {row['arm']} | {row['task']} | {row['tau']:.3f} ± {row['half']:.3f} | {alphas} | {paper} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path, shares: bool) -> None:
    """Draw tau by arm or by share of the data on the left, and acceptance by n (figure 7) on the right."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), constrained_layout=True)
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        x = [float(r["arm"]) if shares else r["arm"] for r in mine]
        left.errorbar(
            x, [r["tau"] for r in mine], [r["half"] for r in mine], marker="o", capsize=4, label=task
        )
        for r in mine:
            right.plot(r["n_alpha"], marker=".", label=f"{r['arm']}, {task}")
    if shares:
        left.set_xscale("log", base=2)
    left.set(ylabel="tau", xlabel="share of the data" if shares else "")
    right.set(ylabel="acceptance", xlabel="n (drafted tokens accepted before)", ylim=(0, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shares_of_data(job: TrainJob) -> dict[str, TrainJob]:
    """The job with SHARES of its documents, by name."""
    count = job.limit or sum(1 for path in job.data for _ in read_rows(path))
    return {f"{share:g}": dataclasses.replace(job, limit=max(1, round(share * count))) for share in SHARES}


def write(out: Path, kind: str, found: dict[str, Any]) -> None:
    """Write <kind>.json, .md and .png into the run's directory."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{kind}.json").write_text(json.dumps(found, indent=2) + "\n")
    (out / f"{kind}.md").write_text(table(found["results"]) + "\n")
    draw(found["results"], out / f"{kind}.png", kind == "scaling")


def study(kind: str, job: TrainJob, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure all arms. The results are written after each arm."""
    if kind == "ablation":
        jobs = arms(job, AutoConfig.from_pretrained(job.target).get_text_config().num_hidden_layers)
    else:
        jobs = shares_of_data(job)
    settings = {k: str(v) for k, v in vars(args).items() if k != "func"}
    origin = provenance([*job.data, *args.eval_prompts], settings)
    results: list[Measured] = []
    found: dict[str, Any] = {}
    for seed in range(args.seeds):
        for name, arm in jobs.items():
            draft, trained_on = train_arm(arm, name, seed)
            measured = measure(
                draft,
                trained_on,
                args.eval_prompts,
                args.eval_limit,
                args.eval_tokens,
                args.num_speculative_tokens,
            )
            results += [Measured(name, seed, *m) for m in measured]
            rows = summary(results)
            found = {
                "provenance": origin,
                "results": rows,
                "runs": [dataclasses.asdict(r) for r in results],
            }
            write(job.settings.out, kind, found)
            logger.info("seed %d, %s\n%s", seed, name, table(rows))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_eagle3.evaluation.studies", description=__doc__)
    kinds = parser.add_subparsers(required=True, dest="kind")
    for kind, text in (("ablation", "table 2: what each idea adds"), ("scaling", "tau against data")):
        command = kinds.add_parser(kind, help=text)
        cli.add_arguments(command)
        command.add_argument("--eval-prompts", nargs="+", type=Path, required=True, metavar="FILE")
        command.add_argument(
            "--eval-limit", type=int, default=20, help="prompts a file (default: %(default)s)"
        )
        command.add_argument("--eval-tokens", type=int, default=128, help="an answer (default: %(default)s)")
        command.add_argument("--num-speculative-tokens", type=int, default=5, help="default: %(default)s")
        command.add_argument("--seeds", type=int, default=3, choices=(1, *T_975), help="default: %(default)s")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    require_packages(["matplotlib", "tensorboard"], "a study", "train")
    study(args.kind, cli.job_from(args), args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
