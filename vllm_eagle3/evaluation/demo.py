"""The demo: answers eight real prompts with and without EAGLE-3, and measures the speed of each way.

1. Greedy, fp32: this project's chain answers, and the text from accepted drafts is marked. Plain vLLM answers as well,
   and the answers must be the same token for token.
2. Batch 1, with one engine for each of: no speculation, vLLM's own eagle3, this project's chains as served by default,
   its trees. They are measured in turn, several times.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vllm_eagle3.config import TreeOptions
from vllm_eagle3.evaluation.accepted_text import BRACKETS, marks_for, wrapped
from vllm_eagle3.evaluation.demo_models import TARGET_NAME, default_draft
from vllm_eagle3.evaluation.metrics import TaskRun
from vllm_eagle3.evaluation.sweep.report import Runs, result_rows
from vllm_eagle3.evaluation.sweep.run import Worker, measure_in_turn
from vllm_eagle3.evaluation.sweep.settings import SweepSettings
from vllm_eagle3.evaluation.widen import widened
from vllm_eagle3.log_files import EngineFailedError, log_file, quiet
from vllm_eagle3.provenance import provenance

PROMPTS = Path(__file__).resolve().parents[2] / "tests" / "data" / "prompts.jsonl"
WIDTH, LINES = 108, 3
TIMED_TOKENS = 32
"""Of each answer that is timed."""
TREE = TreeOptions(depth=3, topk=3, nodes=6)
NAMES = {
    "none": "no speculation",
    "native": "stock eagle3",
    "auto": "vllm-eagle3, chain",
    "tree": "vllm-eagle3, tree",
}
NEXT = """\
Next:  .venv/bin/vllm-eagle3 chat             talk to it; accepted drafts are marked
       examples/serve.sh                       an OpenAI-compatible server; ask it with examples/client.py
       .venv/bin/vllm-eagle3 doctor --target TARGET --draft DRAFT     does the draft you have fit your model?"""


@dataclass(frozen=True)
class DemoSettings:
    """The settings of the demo."""

    num_speculative_tokens: int = 3
    max_tokens: int = 64
    repeats: int = 3
    widen: int | None = None
    """Factor by which the target's MLPs are widened (evaluation/widen.py)."""
    json: Path | None = None


class Story:
    """Prints the demo's text, and the seconds of its long steps."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def say(self, text: str) -> None:
        """Print a line."""
        self.stream.write(f"{text}\n")
        self.stream.flush()

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Print what is being done and about how long it takes. The real seconds follow at its end."""
        self.stream.write(f"   {text} ... ")
        self.stream.flush()
        start = time.perf_counter()
        yield
        self.say(f"{time.perf_counter() - start:.0f} s")


def eight_prompts(folder: Path) -> Path:
    """Every fifth of the repository's forty prompts, first turns only."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()][::5]
    path = folder / "prompts.jsonl"
    first = [row | {"turns": row["turns"][:1], "task": "quickstart"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in first), encoding="utf-8")
    return path


def fetched_target(log: Path) -> Path:
    """The default target, fetched and converted in a separate process. The process writes its messages to `log`.

    Raises:
        EngineFailedError: the target could not be fetched.
    """
    command = [sys.executable, "-m", "vllm_eagle3.cli", "fetch-demo", "--target"]
    with log.open("ab") as file:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, check=False)
    if done.returncode:
        raise EngineFailedError(f"the target {TARGET_NAME} could not be fetched", log)
    return Path(done.stdout.strip())


@contextmanager
def engines(
    settings: SweepSettings, modes: tuple[str, ...], folder: Path, log: Path
) -> Iterator[list[Worker]]:
    """The engines of `modes`, which start at the same time. Waits until all of them are ready."""
    file = folder / f"{settings.dtype}.json"
    file.write_text(settings.to_json(), encoding="utf-8")
    with ExitStack() as stack:
        workers = [Worker(name, mode, file, log=log) for name, mode, _ in settings.runs() if mode in modes]
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:
            worker.wait()
        yield workers


def show_answers(
    chain: Worker, settings: SweepSettings, story: Story
) -> tuple[TaskRun, dict[int, list[int]]]:
    """Print the chain's answers as they finish. Returns its counts and the token ids by prompt."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(settings.target)
    turns = [json.loads(line)["turns"][0] for line in Path(settings.data[0]).read_text("utf-8").splitlines()]
    marks, run, found = marks_for(story.stream), TaskRun("chain", "quickstart"), {}

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    chain.ask({"answer": None})
    for reply in chain.replies():
        if "end" in reply:
            counted = reply["end"]
            run.count(counted["verifications"], counted["accepted"], counted["accepted_per_position"], 0)
            continue
        place, steps = reply["answer"]["prompt"], reply["answer"]["steps"]
        found[place] = [token for step in steps for token in step]
        tokens, verifications = len(found[place]) - len(steps[0]), max(len(steps) - 1, 1)
        question = " ".join(turns[place].split())
        if len(question) > 80:
            question = question[:77] + "..."
        story.say(f"> {question}  ({tokens / verifications:.2f} tokens per verification)")
        for line in wrapped(steps, decode, marks, WIDTH, LINES):
            story.say(f"  {line}")
    return run, found


def answers_of(plain: Worker) -> dict[int, list[int]]:
    """Token ids of the answers without speculation, by prompt."""
    plain.ask({"answer": None})
    replies = (reply["answer"] for reply in plain.replies() if "answer" in reply)
    return {answer["prompt"]: [token for step in answer["steps"] for token in step] for answer in replies}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The speeds, one line for each way."""
    lines = [f"   {'':18} {'tokens/s':>9} {'speed-up (range)':>20} {'tau':>6}"]
    for mode, name in NAMES.items():
        row = rows[mode]
        low, high = row["ratio_range"]
        ratio = f"{row['ratio_to_none']:.2f} ({low:.2f}-{high:.2f})"
        lines.append(f"   {name:18} {row['tokens_per_s']:>9.1f} {ratio:>20} {row['tau']:>6.2f}")
    return lines


def paired_ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Ratios of two engines' speeds in the same repeats, in order of size."""
    return sorted(a / b for a, b in zip(ours, theirs, strict=True))


def median(values: list[float]) -> float:
    """The median of sorted values."""
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def speeds(settings: SweepSettings, workers: list[Worker]) -> dict[str, dict[str, Any]]:
    """The sweep's row of each mode, with the lowest and the highest ratio to no speculation."""
    runs: Runs = {}
    for repeat, worker, size, found in measure_in_turn(workers, settings):
        if repeat:
            runs.setdefault((worker.name, size), []).append(found)
    rows = {row["mode"]: row for row in result_rows(runs)}
    for row in rows.values():
        ratios = paired_ratios(row["runs"], rows["none"]["runs"])
        row["ratio_range"] = (ratios[0], ratios[-1])
    return rows


def run(demo: DemoSettings, stream: TextIO = sys.stdout) -> int:
    """Run the demo. Returns 0, or 1 if the texts differ.

    Raises:
        EngineFailedError: an engine ended early; its log has the reason.
        RuntimeError: too little memory, or the target could not be fetched.
    """
    story, log = Story(stream), log_file("demo")
    with quiet(log), tempfile.TemporaryDirectory() as folder:
        with story.step(f"{TARGET_NAME}: fetching the target, once (about half a minute)"):
            target = fetched_target(log)
            if demo.widen is not None:
                target = widened(target, demo.widen)
        common: dict[str, Any] = {
            "target": str(target),
            "draft": str(default_draft()),
            "data": (str(eight_prompts(Path(folder))),),
            "num_speculative_tokens": demo.num_speculative_tokens,
            "native_tokens": (demo.num_speculative_tokens,),
            "max_model_len": 512,
            "enforce_eager": True,
            "repeats": demo.repeats,
        }
        identity = SweepSettings(
            **common, modes=("chain", "none"), batch_sizes=(4,), dtype="float32", max_tokens=demo.max_tokens
        )
        timing = SweepSettings(
            **common, modes=tuple(NAMES), batch_sizes=(1,), tree=TREE, max_tokens=TIMED_TOKENS
        )
        made = provenance([PROMPTS], {"identity": identity.public(), "speed": timing.public()})
        chain, identical = _texts(identity, Path(folder), log, story)
        rows = _speeds(timing, Path(folder), log, story)
    report = {
        "identical": identical,
        "tau": chain.tau,
        "n_alpha": chain.n_alpha,
        "speedup": rows["auto"]["ratio_to_none"],
        "speedup_over_native": median(paired_ratios(rows["auto"]["runs"], rows["native"]["runs"])),
        "tokens_per_s": {mode: rows[mode]["tokens_per_s"] for mode in NAMES},
        "provenance": made,
    }
    if demo.json:
        demo.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    story.say(f"{NEXT}\nWarnings and what the engines wrote: {log}")
    return 0 if identical else 1


def _texts(settings: SweepSettings, folder: Path, log: Path, story: Story) -> tuple[TaskRun, bool]:
    """Stage 1 of the demo. Returns the counts of the chain, and whether the texts are the target's."""
    marked = "in brackets" if marks_for(story.stream) == BRACKETS else "in green"
    story.say(f"1. Eight answers, greedy, fp32. Text from accepted drafts is {marked}.")
    with ExitStack() as stack:
        with story.step("starting vLLM with and without EAGLE-3 (about half a minute)"):
            live = stack.enter_context(engines(settings, settings.modes, folder, log))
        chain, answers = show_answers(live[0], settings, story)
        identical = answers == answers_of(live[1])
    alphas = ", ".join(f"{share:.2f}" for share in chain.n_alpha)
    verdict = "the same, token for token, as" if identical else "NOT THE SAME as"
    story.say(f"   The texts are {verdict} those without speculation.")
    story.say(
        f"   {chain.tau:.2f} tokens per verification (tau); share of the drafts accepted, by position: {alphas}"
    )
    return chain, identical


def _speeds(settings: SweepSettings, folder: Path, log: Path, story: Story) -> dict[str, dict[str, Any]]:
    """Stage 2 of the demo. At most three engines run at the same time and need about 4 GB together."""
    story.say(
        f"2. How fast? One request at a time, {settings.repeats} repeats of eight answers, without torch.compile."
    )
    with ExitStack() as stack:
        with story.step("starting no speculation, stock eagle3 and a chain (about 40 s)"):
            live = stack.enter_context(engines(settings, ("none", "native", "auto"), folder, log))
        with story.step("measuring (about a minute)"):
            rows = speeds(settings, live)
        for worker in live[1:]:
            worker.close()
        with story.step("a tree beside no speculation (about a minute)"):
            trees = stack.enter_context(engines(settings, ("tree",), folder, log))
            rows = speeds(settings, [live[0], *trees]) | rows
    for line in table(rows):
        story.say(line)
    return rows
